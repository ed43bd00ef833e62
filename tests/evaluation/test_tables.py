"""Tables of `bench`."""

from evaluation.tables import print_together


def test_the_column_of_ratios_names_the_least_number_of_requests(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    times = {"p50": 1.0, "p95": 2.0}
    arm = {"ttft_ms": times, "itl_ms": times, "sequences_per_pass": 1.0}
    found = {str(number): {"plain": {**arm, "tokens_per_second": 10.0 * number}} for number in (8, 4)}
    print_together({"concurrency": found})
    head, eight, four = capsys.readouterr().out.splitlines()
    assert "of 4 plain" in " ".join(head.split())
    assert eight.split()[:4] == ["8", "plain", "80.0", "2.00"]
    assert four.split()[:4] == ["4", "plain", "40.0", "1.00"]
