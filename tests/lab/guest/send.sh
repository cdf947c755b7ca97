# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Sends a mapped file that nobody has touched since the boot.
# $1: address and port of the receiver
set -eu
modprobe -a virtio_pci virtio_net
ip addr add 10.0.0.2/24 dev eth0
ip link set eth0 up
mount -o dax,noinit_itable /dev/pmem0 /mnt
guest_io send /mnt/a 0 8M "$1"
umount /mnt
