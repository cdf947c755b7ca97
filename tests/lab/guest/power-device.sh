# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# On an nvdimm, straight on the device, because of a filesystem that was not flushed nothing is promised: "write" tells of each
# record that fsync has returned for, for ever; "count" counts, and fails if there is anything that was never written.
# $1: write or count
set -eu
case $1 in
write) guest_io records each /dev/pmem0 1 ;;
count) guest_io records salvage /dev/pmem0 1 ;;
esac
