# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Stores files before and after a line on the console, while something is done to the machine's memory; checks them.
# $1: "store", or "verify" what an earlier guest has stored
set -eu
if [ "$1" = store ]; then
    modprobe -a virtio_pci virtio_balloon
    ndctl create-namespace -f -e namespace0.0 -m fsdax -a 2M -M mem >/dev/null
    mkfs.ext4 -q -F -b 4096 -N 1024 -E lazy_journal_init=1 /dev/pmem0
fi
mount -o dax,noinit_itable /dev/pmem0 /mnt
if [ "$1" = store ]; then
    guest_io store /mnt/before 0 8M 1
    echo stored
    read -r line
    guest_io verify /mnt/before 0 8M 1
    guest_io store /mnt/after 0 8M 2
    echo "written: $(du -k /mnt/before /mnt/after | awk '{ kib += $1 } END { print kib }')"
fi
guest_io verify /mnt/before 0 8M 1
guest_io verify /mnt/after 0 8M 2
umount /mnt
