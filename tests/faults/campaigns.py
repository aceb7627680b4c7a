"""The table of fault campaigns: CAMPAIGNS, which `scripts/faults` runs and `test_campaign.py` runs for some seconds."""

from tests.faults import operation_faults, scenarios
from tests.faults.campaign import Campaign

CAMPAIGNS: dict[str, Campaign] = {
    "kill": Campaign(
        "SIGKILL at every file operation", scenarios.prepare, operation_faults.cases("kill"), operation_faults.try_case
    ),
    "cut": Campaign(
        "ended within a write", scenarios.prepare, operation_faults.cases("cut"), operation_faults.try_case
    ),
    "error": Campaign(
        "errors of file operations", scenarios.prepare, operation_faults.cases("error"), operation_faults.try_case
    ),
    "limit": Campaign(
        "files limited in size", scenarios.prepare, operation_faults.cases("limit"), operation_faults.try_case
    ),
    "disk": Campaign("full disk", scenarios.prepare, operation_faults.cases("disk"), operation_faults.try_case),
}
