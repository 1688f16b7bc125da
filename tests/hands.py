"""A clock that is turned by hand: no test waits for time to pass."""


class Hands:
    """Stands for `time.perf_counter`."""

    def __init__(self):
        self.time = 100.0

    def __call__(self) -> float:
        return self.time

    def pass_(self, seconds: float) -> None:
        self.time += seconds
