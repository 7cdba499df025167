"""The last line of a test run says what happened, and a program that dies silently is a failure."""

import tally

CTEST = """<testsuite>
<testcase name="a_test" status="run"/>
<testcase name="crash_test" status="fail"><failure message=""/></testcase>
<testcase name="plain" status="run"/>
<testcase name="missing" status="notrun"><skipped message="Unable to find executable"/></testcase>
</testsuite>"""
CASES = """<testsuites><testsuite name="A">
<testcase name="Good" classname="A" status="run"/>
<testcase name="Bad" classname="A" status="run"><failure message="no"/></testcase>
<testcase name="Left" classname="A" status="run"><skipped message="needs 8 GiB"/></testcase>
</testsuite></testsuites>"""


def run(tmp_path, capsys):
    code = tally.main(tmp_path)
    return code, capsys.readouterr().out.splitlines()


def test_cases_programs_and_scripts_are_added_up(tmp_path, capsys):
    folder = tmp_path / "asan"
    (folder / "gtest").mkdir(parents=True)
    (folder / "ctest.xml").write_text(CTEST)
    (folder / "gtest/a_test.xml").write_text(CASES)
    (tmp_path / "scripts.txt").write_text("passed one\nfailed the other\n")
    code, lines = run(tmp_path, capsys)
    assert code == 1
    assert lines[-1] == "3 passed, 4 failed"
    listed = "\n".join(lines)
    for name in ("A.Bad", "crash_test", "missing", "the other", "needs 8 GiB"):
        assert name in listed


def test_all_passed(tmp_path, capsys):
    (tmp_path / "scripts.txt").write_text("passed one\n")
    assert run(tmp_path, capsys) == (0, ["1 passed, 0 failed"])


def test_nothing_run_is_no_success(tmp_path, capsys):
    assert run(tmp_path, capsys) == (1, ["0 passed, 0 failed"])
