# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Sends a mapped file that nobody has touched since the boot, and receives another one.
# $1, $2: address and port of who receives, and of who sends
set -eu
modprobe -a virtio_pci virtio_net
ip addr add 10.0.0.2/24 dev eth0
ip link set eth0 up
mount -o dax,noinit_itable /dev/pmem0 /mnt
guest_io send /mnt/a 0 8M "$1"
# Its input stays open: at its end, nc would have who sends end, too.
mkfifo /tmp/open
exec 3<>/tmp/open
# Who sends begins to listen when it has received.
until nc "${2%:*}" "${2#*:}" <&3 >/mnt/b; do usleep 100000; done
echo "sum: $(md5sum </mnt/b)"
umount /mnt
