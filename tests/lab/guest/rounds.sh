# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Writes and checks files, round after round, and says so; all of them are checked again in the end.
# $1: number of rounds
set -eu
ndctl create-namespace -f -e namespace0.0 -m fsdax -a 2M -M mem >/dev/null
mkfs.ext4 -q -F -b 4096 -N 1024 -E lazy_journal_init=1 /dev/pmem0
mount -o dax,noinit_itable /dev/pmem0 /mnt
round=0
while [ "$round" -lt "$1" ]; do
    file=/mnt/file$((round % 16))
    rm -f "$file"
    guest_io store "$file" 0 4M "$round"
    guest_io verify "$file" 0 4M "$round"
    md5sum "$file" >"$file.sum"
    echo "round $round."
    round=$((round + 1))
done
umount /mnt
mount -o dax,noinit_itable /dev/pmem0 /mnt
cat /mnt/*.sum | md5sum -c
umount /mnt
