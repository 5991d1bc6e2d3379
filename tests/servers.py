"""Servers of the standard library, in a thread."""

import contextlib
import threading


@contextlib.contextmanager
def running(server):
    """Have a server answer until the block's end."""
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
