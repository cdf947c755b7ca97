# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# On a virtio-pmem: "write" makes a filesystem and has two writers tell of each record that fsync has made durable, for ever;
# "count" looks at the filesystem after its journal has been replayed, and counts.
# $1: write or count
set -eu
modprobe -a virtio_pci virtio_pmem
until [ -b /dev/pmem0 ]; do usleep 100000; done
if [ "$1" = write ]; then
    mkfs.ext4 -q -F -b 4096 -N 1024 -E lazy_journal_init=1 /dev/pmem0
    mount -o dax,noinit_itable /dev/pmem0 /mnt
    guest_io records append /mnt/first 1 &
    guest_io records each /mnt/second 2
    exit 1
fi
mount -o dax,noinit_itable /dev/pmem0 /mnt
umount /mnt
e2fsck -f -n /dev/pmem0
mount -o dax,noinit_itable /dev/pmem0 /mnt
guest_io records count /mnt/first 1
guest_io records count /mnt/second 2
umount /mnt
if dmesg | grep -E 'EXT4-fs (error|warning)|JBD2: .*(error|checksum)|I/O error|BUG:|Oops'; then exit 1; fi
