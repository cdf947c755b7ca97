# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# With "write": has three writers write records until there is a line on the console. Then, or with "count" alone, looks at
# the filesystem after its journal has been replayed, and tells every writer's number of records.
# $1: write or count
set -eu
modprobe -a virtio_pci virtio_blk
if [ "$1" = write ]; then
    ndctl create-namespace -f -e namespace0.0 -m fsdax -a 2M -M mem >/dev/null
    mkfs.ext4 -q -F -b 4096 -N 1024 -E lazy_journal_init=1 /dev/pmem0
    mount -o dax,noinit_itable /dev/pmem0 /mnt
    guest_io records append /mnt/first 1 &
    writers=$!
    guest_io records store /mnt/second 2 &
    writers="$writers $!"
    guest_io records load /mnt/third /dev/vda &
    writers="$writers $!"
    read -r line
    touch /tmp/stop
    for writer in $writers; do wait "$writer"; done
    umount /mnt
fi
mount -o dax,noinit_itable /dev/pmem0 /mnt
umount /mnt
e2fsck -f -n /dev/pmem0
mount -o dax,noinit_itable /dev/pmem0 /mnt
guest_io records count /mnt/first 1
guest_io records count /mnt/second 2
guest_io records count /mnt/third 3
umount /mnt
# A filesystem goes on after some errors, and only says so.
if dmesg | grep -E 'EXT4-fs (error|warning)|I/O error|[Hh]ardware [Ee]rror|BUG:|Oops'; then exit 1; fi
