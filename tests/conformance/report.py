"""A table of checks, and an exit status that CI can read."""
import sys
import traceback


class Report:
    def __init__(self):
        self.passed = self.failed = 0

    def check(self, name, body):
        """Runs `body`; what it returns is shown beside the name."""
        try:
            shown = body()
            self.passed += 1
            print(f"ok    {name:44} {shown or ''}", flush=True)
        except Exception as error:  # noqa: BLE001 - every failure is reported, none ends the run
            self.failed += 1
            print(f"FAIL  {name:44} {type(error).__name__}: {error}", flush=True)
            if not isinstance(error, AssertionError):
                traceback.print_exc()

    def finish(self):
        print(f"{self.passed} passed, {self.failed} failed")
        sys.exit(1 if self.failed or not self.passed else 0)
