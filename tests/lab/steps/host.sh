# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# The host itself, its filesystems, and the tests of this workspace that run on it.

DAX=/dax

host_has_kvm() {
    uname -a
    grep -q -w svm /proc/cpuinfo
    cat /sys/module/kvm_amd/parameters/npt
    test -c /dev/kvm
}

make_namespace() {
    ndctl create-namespace -f -e namespace0.0 -m fsdax -a 2M -M mem
    test -b /dev/pmem0
}

# mount_dax ext4|xfs
mount_dax() {
    case $1 in
    ext4)
        mkfs.ext4 -q -F -b 4096 -E stride=512 /dev/pmem0
        mount -t ext4 -o dax /dev/pmem0 "$DAX"
        ;;
    xfs)
        mkfs.xfs -q -f -d su=2m,sw=1 /dev/pmem0
        mount -t xfs -o dax=always /dev/pmem0 "$DAX"
        ;;
    esac
    grep "$DAX" /proc/mounts
    grep "$DAX" /proc/mounts | grep -q -w dax=always
    mkdir "$DAX/tmp"
}

unmount_dax() {
    umount "$DAX"
}

image_is_dax() {
    pcow-img create "$DAX/info.pcow" 64M
    pcow-img info "$DAX/info.pcow" | tee /tmp/info
    grep -q '^persistence: *DAX$' /tmp/info
    pcow-img check "$DAX/info.pcow"
    rm -r "$DAX/info.pcow"
}

# rust_test NAME [FILTER]...: a test program, or those of its tests whose name contains a filter. Its
# temporary files are on the DAX filesystem.
rust_test() {
    name=$1
    shift
    mkdir -p "$DAX/tmp"
    TMPDIR=$DAX/tmp RUST_BACKTRACE=1 "/lab/deps/$name" "$@"
    test -z "$(ls -A "$DAX/tmp")" || fail "left behind: $(ls "$DAX/tmp")"
}

# Dirty pages stay in memory until somebody asks for them to be written.
write_nothing_back() {
    for setting in dirty_writeback_centisecs=0 dirty_expire_centisecs=360000 dirty_ratio=95 dirty_background_ratio=90; do
        echo "${setting#*=}" >"/proc/sys/vm/${setting%=*}"
    done
}

# Tells ratios on the second serial line. No ratio is a failure. What the kernel writes back by itself, with page faults
# behind it, would fall on one mapping or on the other.
bench() {
    write_nothing_back
    pcow-bench --ratios --dir "$DAX/tmp" >/tmp/ratios
    cat /tmp/ratios
    [ "$(wc -l </tmp/ratios)" -ge 2 ] || fail "there are no ratios"
    sed 's/^/LAB-VALUE /' /tmp/ratios >/dev/ttyS1
}
