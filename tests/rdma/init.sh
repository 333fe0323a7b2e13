#!/bin/busybox sh
# The guest's first process: makes the host's files its own (read-only; what is written goes to memory), adds a network
# card that speaks RDMA verbs in software, runs /job there, and tells its exit status on the second serial line.
# From the kernel's command line come MODULES, a folder of the host, and DEVICE, the name that the card gets.
/bin/busybox --install -s /bin
export PATH=/usr/bin:/bin:/usr/sbin:/sbin

end() {
    echo "$1" >/dev/ttyS1
    poweroff -f
}
need() { "$@" || { echo "the guest can't be set up: $* failed" >&2; end 125; }; }

need mount -t proc proc /proc
need mount -t sysfs sysfs /sys
need mount -t devtmpfs devtmpfs /dev
for module in virtio_pci 9pnet_virtio 9p; do need modprobe "$module"; done

mkdir -p /host /memory /root
need mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=1048576 host /host
for disk in /sys/class/bdi/9p*; do echo 4096 >"$disk/read_ahead_kb"; done
rm -r /lib/modules
ln -s "/host$MODULES" /lib/modules
for module in overlay crc32_generic dummy rdma_rxe; do need modprobe "$module"; done

need mount -t tmpfs -o size=60% tmpfs /memory
mkdir /memory/work
cp -a /files /memory/upper
need mount -t overlay -o "lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work" overlay /root
for tree in proc sys dev; do need mount --rbind "/$tree" "/root/$tree"; done
mkdir -p /root/dev/shm
need mount -t tmpfs tmpfs /root/dev/shm

ip link set lo up
ip link add card type dummy
ip address add 192.0.2.1/24 dev card
ip link set card up
need chroot /root rdma link add "$DEVICE" type rxe netdev card

cp /job /root/tmp/job
chroot /root /bin/bash /tmp/job
end "$?"
