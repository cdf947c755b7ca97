# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Makes a DAX filesystem on the persistent memory and writes files with their checksums.
# $1: name of the first file
# $2: "wait" for a line on the console, with all of that mapped
set -eu
cat /sys/block/pmem0/size
grep -m1 -o -w hypervisor /proc/cpuinfo
ndctl create-namespace -f -e namespace0.0 -m fsdax -a 2M -M mem
mkfs.ext4 -q -F -b 4096 -N 1024 -E lazy_journal_init=1 /dev/pmem0
# What lazy initialisation would write besides depends on time.
mount -o dax,noinit_itable /dev/pmem0 /mnt
cd /mnt
dd if=/dev/urandom of="$1" bs=64k count=64 2>/dev/null
dd if=/dev/urandom of=other bs=64k count=64 2>/dev/null
echo "written: $(du -k "$1" other | awk '{ kib += $1 } END { print kib }')"
sha256sum "$1" other >sums
echo "sums: $(sha256sum <sums)"
if [ "${2:-}" = wait ]; then read -r line; fi
cd /
umount /mnt
