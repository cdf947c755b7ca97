# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Checks what earlier guests have written.
# $@: names of the files
set -eu
mount -o dax /dev/pmem0 /mnt
cd /mnt
sha256sum -c sums
for name; do
    sha256sum "$name"
    grep "$name" sums
done
cd /
umount /mnt
