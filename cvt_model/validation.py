"""pydantic's findings in one line for people."""

from pydantic import ValidationError


def describe_validation_error(error: ValidationError) -> str:
    """Every finding, led by the field it concerns."""
    findings = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        findings.append(f"{where}: {message}" if where else message)
    return "; ".join(findings)
