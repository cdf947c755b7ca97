# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Stores into two files, each from two processors at once, while others load the same pages; checks both, and one that nobody
# stores to.
# $1: "store", or "verify" what an earlier guest has stored
set -eu
nproc
mount -o dax,noinit_itable /dev/pmem0 /mnt
if [ "$1" = store ]; then
    writers=
    for file in a b; do
        for _ in 1 2; do
            guest_io store "/mnt/$file" 0 8M 11 &
            writers="$writers $!"
        done
        while [ ! -e /tmp/stored ]; do md5sum "/mnt/$file" >/dev/null; done &
    done
    for writer in $writers; do wait "$writer"; done
    touch /tmp/stored
    wait
fi
guest_io verify /mnt/a 0 8M 11
guest_io verify /mnt/b 0 8M 11
guest_io verify /mnt/c 0 8M 7
umount /mnt
