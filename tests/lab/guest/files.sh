# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Makes a DAX filesystem, and three files in it, stored through a mapping; tells their sums.
set -eu
ndctl create-namespace -f -e namespace0.0 -m fsdax -a 2M -M mem >/dev/null
mkfs.ext4 -q -F -b 4096 -N 1024 -E lazy_journal_init=1 /dev/pmem0
mount -o dax,noinit_itable /dev/pmem0 /mnt
for file in a b c; do
    guest_io store "/mnt/$file" 0 8M 7
    echo "sum: $(md5sum <"/mnt/$file")"
done
umount /mnt
