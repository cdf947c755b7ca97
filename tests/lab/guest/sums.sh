# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Tells the sums of the three files.
set -eu
mount -o dax,noinit_itable /dev/pmem0 /mnt
for file in a b c; do
    echo "sum: $(md5sum <"/mnt/$file")"
done
umount /mnt
