"""Says how many tests of a ctest run passed, failed and were skipped, and why: summarize_tests.py RESULTS.xml

RESULTS.xml is what `ctest --output-junit` writes. Tests that were skipped for the same reason share a line.
"""

import re
import sys
import xml.etree.ElementTree as ElementTree


def outcome_of(test):
    status, skipped = test.get("status"), test.find("skipped")
    if status == "run":
        return "passed"
    # A test whose program is missing is "notrun", too, but without a pattern that its output matched.
    by_itself = status == "notrun" and skipped is not None and skipped.get("message").startswith("SKIP_")
    return "skipped" if by_itself or status == "disabled" else "failed"


def reason_of(test):
    """Why `test` was skipped: what GTEST_SKIP() << said, one line after "file:line: Skipped"."""
    if test.get("status") == "disabled":
        return "disabled, since it takes long; its file says how to run it"
    output = test.findtext("system-out") or ""
    said = re.search(r": Skipped\n(.+)", output)
    return said.group(1) if said else "no reason given"


def main():
    tests = {outcome: [] for outcome in ("passed", "failed", "skipped")}
    for test in ElementTree.parse(sys.argv[1]).getroot().iter("testcase"):
        tests[outcome_of(test)].append(test)
    if not any(tests.values()):
        return  # they were listed, not run
    reasons = {}
    for test in tests["skipped"]:
        reasons.setdefault(reason_of(test), []).append(test.get("name"))
    for reason, names in sorted(reasons.items()):
        print(f"skipped {len(names)}: {reason}")
        print("".join(f"    {name}\n" for name in names), end="")
    for test in tests["failed"]:
        print("failed:", test.get("name"))
    print(", ".join(f"{len(found)} {outcome}" for outcome, found in tests.items()))


if __name__ == "__main__":
    main()
