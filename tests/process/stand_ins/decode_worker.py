from stand_in import worker

from cluster.messages import Role

worker("decode_worker", Role.DECODE)
