"""The table of fault campaigns: CAMPAIGNS, which `scripts/faults` runs and `test_campaign.py` runs for some seconds."""

from tests.faults import links, operation_faults, random_kills, scenarios, two_at_once
from tests.faults.campaign import Campaign

CAMPAIGNS: dict[str, Campaign] = {
    "random": Campaign(
        "SIGKILL of training at random moments",
        random_kills.prepare,
        random_kills.cases,
        random_kills.try_case,
        500,
        3.0,
    ),
    "processes": Campaign(
        "SIGKILL of a run with two processes",
        random_kills.prepare_two,
        random_kills.cases_of_two,
        random_kills.try_case,
        12,
    ),
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
    "links": Campaign("links in place of files", links.prepare, links.cases, links.try_case, 700),
    "two": Campaign("two commands at once", scenarios.prepare, two_at_once.cases, two_at_once.try_case, 150),
}
