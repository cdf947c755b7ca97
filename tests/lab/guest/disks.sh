# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Reads each disk into a mapped file, while others load the same pages.
set -eu
modprobe -a virtio_pci virtio_blk
mount -o dax,noinit_itable /dev/pmem0 /mnt
for file in a b c; do
    while [ ! -e /tmp/read ]; do md5sum "/mnt/$file" >/dev/null; done &
    guest_io read "/mnt/$file" 0 8M "/dev/vd$file"
    touch /tmp/read
    wait
    rm /tmp/read
    echo "sum: $(md5sum <"/mnt/$file")"
done
if dmesg | grep 'I/O error'; then exit 1; fi
umount /mnt
