"""The table of fault campaigns: CAMPAIGNS, which `scripts/faults` runs and `test_campaign.py` runs for some seconds."""

from tests.faults import damaged_results, links, operation_faults, random_kills, scenarios, two_at_once
from tests.faults.campaign import Campaign


def _of_operations(title: str, fault: operation_faults.Fault, *, share: float) -> Campaign:
    return Campaign(title, scenarios.prepare, operation_faults.cases(fault), operation_faults.try_case, None, share)


CAMPAIGNS: dict[str, Campaign] = {
    "random": Campaign(
        "training, killed at a random moment", random_kills.prepare, random_kills.cases, random_kills.try_case, 500, 3
    ),
    "processes": Campaign(
        "training in two processes, one killed",
        random_kills.prepare_two,
        random_kills.cases_of_two,
        random_kills.try_case,
        12,
    ),
    "kill": _of_operations("killed before a file operation", "kill", share=3),
    "cut": _of_operations("killed within a write", "cut", share=2),
    "error": _of_operations("a file operation fails", "error", share=3),
    "limit": _of_operations("the size of files is limited", "limit", share=1),
    "disk": _of_operations("the disk is full", "disk", share=1),
    "vanish": _of_operations("files vanish", "vanish", share=1),
    "damage": Campaign(
        "damaged files", damaged_results.prepare, damaged_results.cases, damaged_results.try_case, None, 3
    ),
    "links": Campaign("links in place of files", links.prepare, links.cases, links.try_case, 700),
    "two": Campaign("two commands at once", scenarios.prepare, two_at_once.cases, two_at_once.try_case, 150),
}
