"""Metric writers that a user might write."""

import csv

from runner.metrics.writer import MetricWriter


class CSVWriter(MetricWriter):
    """One table of steps and losses. A resume cuts the file at its mark."""

    def __init__(self, context, name="losses.csv"):
        path = context.location.path / name
        path.touch()
        self.file = path.open("r+", newline="")
        self.file.truncate(context.mark["bytes"] if context.mark else 0)
        self.file.seek(0, 2)
        self.rows = csv.writer(self.file)

    def add(self, step, values):
        if "train/loss" in values:
            self.rows.writerow([step, values["train/loss"]])

    def mark(self, step):
        self.file.flush()
        return {"bytes": self.file.tell()}

    def flush(self):
        self.file.flush()

    def close(self, status):
        self.file.close()


class FailingWriter(CSVWriter):
    """Fails in one of its methods at the second call."""

    def __init__(self, context, method, error):
        super().__init__(context)
        self.error = {"OSError": OSError, "KeyError": KeyError}[error]
        self.calls = 0
        setattr(self, method, self.fail)

    def fail(self, *arguments):
        self.calls += 1
        if self.calls == 2:
            raise self.error("the server went away")
        return {}


class ListedMarks(CSVWriter):
    """Returns a mark that is not a mapping."""

    def mark(self, step):
        return [step]


class NoWriter:
    """Has another base class."""

    def __init__(self, context):
        pass


def refused(context, token):
    """Cannot be constructed."""
    raise PermissionError(f"no account for {context.run}")
