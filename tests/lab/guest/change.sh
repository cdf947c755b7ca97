# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Checks the base's files, changes a part of one of them and writes another one.
# $1: name of the new file
set -eu
mount -o dax,noinit_itable /dev/pmem0 /mnt
cd /mnt
sha256sum -c sums
dd if=/dev/urandom of=other bs=4k count=3 seek=77 conv=notrunc 2>/dev/null
echo "$1" >"$1"
ls | grep -v -x -e sums -e lost+found | xargs sha256sum >/tmp/sums
cp /tmp/sums sums
echo "sums: $(sha256sum <sums)"
cd /
umount /mnt
