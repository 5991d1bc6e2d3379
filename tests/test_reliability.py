"""Short runs of what ``nox -s reliability`` does for long."""

from reliability import run, soak


def test_random_operations_under_random_faults_have_no_wrong_result():
    figures = run(seed=1, operations=300)

    assert figures["wrong"] == []
    assert figures["uploads left open"] == 0
    assert figures["operations"].total() == 300
    assert sum(figures["faults"].values()) > 50
    assert sum(figures["retries"].values()) > 20


def test_soak_reads_what_it_says():
    assert soak(1000)["GETs"] == 1000
