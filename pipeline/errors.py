"""The errors that people see, and nothing else.

Each names the thing that is wrong and the remedy. `jobs/` maps the classes to exit codes. What is not
one of these classes is our own bug and is caught nowhere.
"""

from __future__ import annotations


class PipelineError(Exception):
    """Something that the user can mend; the message says what and how."""


class ConfigError(PipelineError):
    """A bad config key, value or argument (exit 2)."""


class InputError(PipelineError):
    """The input does not exist, matches nothing or cannot be read as what it claims to be (exit 2)."""


class EmptyInputError(InputError):
    """The input holds nothing to read (exit 2; 3 where the output shows that it once did)."""


class OutputError(PipelineError):
    """The output cannot be written, or holds something else (exit 2)."""


class FingerprintError(OutputError):
    """The output was made by another model, preprocessing, precision or column set (exit 2)."""


class SearchError(PipelineError):
    """There is no index, or it cannot answer this query (exit 2)."""


class LimitError(PipelineError):
    """A limit of the configuration stopped the run; what is committed stays (exit 3)."""


class BusyError(PipelineError):
    """Another run holds the output (exit 4)."""


class StorageError(PipelineError, OSError):
    """Storage failed: a full disk, a dead endpoint, no permission (exit 1). Also an OSError."""


class WorkersDiedError(PipelineError):
    """Workers of the cluster died again and again over the same work: memory, or an input (exit 1).

    `reason` is Ray's, cut to its beginning; `less` what makes the work need less memory.
    """

    def __init__(self, times: int, reason: object, less: str = "the run fewer actors") -> None:
        often = "once" if times == 1 else f"{times} times"
        beginning = " ".join(str(reason).split())[:200]
        super().__init__(
            f"workers died {often} over the same work ({beginning}); look for the out-of-memory killer "
            f"in the system's log, give the machine more memory or {less}, and run again: "
            "what is committed stays"
        )
        self.short = f"workers died {often} over it ({beginning})"


class DecoderError(PipelineError):
    """The process that decodes images cannot be started (exit 1)."""


class ShardError(Exception):
    """One shard cannot be read to its end; it is left uncommitted and named, and the run goes on."""


class Interrupted(PipelineError):  # noqa: N818 - the field's word for it
    """A signal asked the run to stop; what was committed stays (exit 128 + signal number)."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}; what is committed stays, run again to go on")
        self.signum = signum
