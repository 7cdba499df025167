"""Adds up the results of a test run: prints each failed and skipped case, then `N passed, N failed`.

tally.py FOLDER. Below FOLDER: ctest.xml (ctest --output-junit) beside gtest/*.xml (GTEST_OUTPUT),
any other *.xml as pytest writes it, and *.txt with one `passed|failed NAME` per line for scripts.
A GoogleTest binary counts case by case; one that ended without saying which case failed counts as
one failure. Exit 0 when something passed and nothing failed.
"""

import pathlib
import sys
import xml.etree.ElementTree as ET


class Tally:
    def __init__(self):
        self.passed, self.failed, self.skipped = 0, [], []

    def add_case(self, prefix, case):
        name = f"{prefix}{case.get('classname') or ''}.{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            self.failed.append(name)
        elif (skip := case.find("skipped")) is not None:
            self.skipped.append(f"{name}: {skip.get('message') or 'no reason given'}")
        elif case.get("status") in ("notrun", "disabled"):
            self.skipped.append(f"{name}: disabled")
        else:
            self.passed += 1

    def add_junit(self, path, prefix):
        for case in ET.parse(path).iter("testcase"):
            self.add_case(prefix, case)

    def add_ctest(self, path, prefix):
        for case in ET.parse(path).iter("testcase"):
            name = case.get("name")
            ok = case.get("status") == "run"  # anything else: failed, not run, timed out
            detail = path.parent / "gtest" / f"{name}.xml"
            failed_before = len(self.failed)
            if detail.exists():
                self.add_junit(detail, f"{prefix}{name}: ")
            elif ok:
                self.passed += 1
            if not ok and len(self.failed) == failed_before:
                self.failed.append(f"{prefix}{name}: the program failed or did not end")

    def add_text(self, path, prefix):
        for line in path.read_text().splitlines():
            verdict, name = line.split(" ", 1)
            if verdict == "passed":
                self.passed += 1
            else:
                self.failed.append(prefix + name)


def main(folder):
    tally = Tally()
    root = pathlib.Path(folder)
    for path in sorted(root.rglob("*")):
        if "gtest" in path.relative_to(root).parts[:-1]:
            continue  # read with its ctest.xml
        parent = path.parent.relative_to(root)
        prefix = "" if parent == pathlib.Path() else f"{parent}: "
        if path.name == "ctest.xml":
            tally.add_ctest(path, prefix)
        elif path.suffix == ".xml":
            tally.add_junit(path, prefix)
        elif path.suffix == ".txt":
            tally.add_text(path, prefix)
    for name in tally.skipped:
        print(f"  skipped {name}")
    for name in tally.failed:
        print(f"  failed  {name}")
    print(f"{tally.passed} passed, {len(tally.failed)} failed")
    return 0 if tally.passed and not tally.failed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
