"""What the check of a cluster makes of nodes before it asks them."""

from __future__ import annotations

from rlhf3d.placement.cluster_check import ClusterReport, _names, cluster_view
from rlhf3d.placement.node_report import NodeReport

REPORT = NodeReport("a (1.1.1.1)", {"ray": "2"}, None, None, {}, None, None, 0)


def test_nodes_of_one_host_keep_names_of_their_own() -> None:
    named = {"0123456789": "a (1.1.1.1)", "abcdefghij": "a (1.1.1.1)", "xyz": "b (1.1.1.2)"}
    assert list(_names(named).values()) == [
        "a (1.1.1.1) 01234567",
        "a (1.1.1.1) abcdefgh",
        "b (1.1.1.2)",
    ]


def lines(checked: ClusterReport) -> str:
    return "\n".join(map(str, cluster_view(checked).parts))


def test_what_was_found_is_told_with_its_problems() -> None:
    text = lines(ClusterReport([REPORT], ["node a (1.1.1.1): old"], 0.5))
    assert "node a (1.1.1.1): no GPU; ray 2" in text and "over 1 nodes: 0.5000 s" in text
    assert text.endswith("these nodes cannot run one job\n  - node a (1.1.1.1): old")
    assert lines(ClusterReport([REPORT], [], None)).endswith("all is well")
    assert cluster_view(ClusterReport([REPORT], [], None)).data["problems"] == []
