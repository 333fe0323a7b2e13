"""Workers as bootstrap would tell of them."""

from cluster.layout import KVLayout
from cluster.messages import Load, Member, MemberStatus, ModelCard, Role

LAYOUT = KVLayout("weights", "float32", 16, 2, 1, 8)


def member_status(worker: str, *, ready: bool = True, age_seconds: float = 0.5, stalled: str = "") -> MemberStatus:
    role = Role(worker.partition("-")[0])
    member = Member(worker, role, 1_800_000_000_123_456_789, "http://x", LAYOUT, ModelCard("m", 64, 100), "nixl", 8, 4)
    load = Load(
        queued=2, running=1, pages_used=3, pages_total=8, pages_quarantined=1, steps=7, ready=ready, stalled=stalled
    )
    return MemberStatus(member, load, age_seconds)
