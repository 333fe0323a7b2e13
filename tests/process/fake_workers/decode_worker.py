from fake_process import main

from cluster.messages import Role

main(Role.DECODE)
