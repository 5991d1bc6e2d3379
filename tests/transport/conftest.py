"""A certificate."""

import ssl

import pytest
import trustme


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """What a server over TLS shows, and the file of the CA to trust."""
    ca = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    ca_file = tmp_path_factory.mktemp("ca") / "ca.pem"
    ca.cert_pem.write_to_path(ca_file)
    return context, str(ca_file)
