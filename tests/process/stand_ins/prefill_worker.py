from stand_in import worker

from cluster.messages import Role

worker("prefill_worker", Role.PREFILL)
