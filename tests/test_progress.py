from rayclip.progress import Display


def lines(capsys, *updates, **options):
    with Display(**options) as display:
        for update in updates:
            display.update(*update)
    return capsys.readouterr().err.splitlines()


def test_without_a_terminal_a_task_has_few_lines_and_one_at_its_end(capsys):
    out = lines(
        capsys, ("a", 0, 0, "waiting"), *(("a", i, 100, f"loss {i}") for i in range(101)), ("a", 100, 100, "again")
    )
    assert len(out) == 2 and "a" in out[0] and "0/100" in out[0]
    assert "100/100  loss 100" in out[1]


def test_quiet_says_nothing(capsys):
    assert lines(capsys, ("a", 1, 1, "done"), quiet=True) == []
