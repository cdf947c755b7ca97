# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# The steps of the lab host: sh -eu steps.sh FUNCTION [ARGUMENT]...

PATH=/lab:$PATH
DAX=/dax
SOCKET=/tmp/backend.sock
GUEST_SECONDS=300

fail() {
    echo "$*"
    exit 1
}

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
    mkdir -p "$DAX"
    case $1 in
    ext4)
        mkfs.ext4 -q -F -b 4096 /dev/pmem0
        mount -t ext4 -o dax /dev/pmem0 "$DAX"
        ;;
    xfs)
        mkfs.xfs -q -f /dev/pmem0
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

start_backend() {
    rm -f "$SOCKET"
    pcow-backend --socket "$SOCKET" --image "$1" 2>/tmp/backend.log &
    backend=$!
    for _ in $(seq 300); do
        if [ -S "$SOCKET" ]; then return 0; fi
        kill -0 "$backend" || break
        usleep 100000
    done
    cat /tmp/backend.log
    fail "the backend does not listen"
}

end_backend() {
    kill -TERM "$backend"
    status=0
    wait "$backend" || status=$?
    cat /tmp/backend.log
    [ "$status" = 0 ] || fail "the backend ended with $status"
    grep -q 'DAX: what the guest flushes is durable' /tmp/backend.log
}

# guest IMAGE SCRIPT [WORD]...: boots a guest under KVM on the image; it runs a script of the folder
# guest with the words, and powers off.
guest() {
    image=$1
    script=$2
    shift 2
    rm -rf /tmp/guest
    mkdir /tmp/guest
    { echo "set -- $*"; cat "/lab/guest/$script.sh"; } >/tmp/guest/script
    cp /lab/machine/initramfs.gz /tmp/initramfs
    (cd /tmp/guest && echo script | cpio -o -H newc --quiet) >>/tmp/initramfs
    start_backend "$image"
    timeout -s KILL "$GUEST_SECONDS" qemu-system-x86_64 \
        -machine q35,nvdimm=on,accel=kvm -cpu host -smp 2 -m 512M,slots=2,maxmem=4G \
        -nodefaults -display none -no-reboot -serial stdio \
        -kernel /lab/machine/vmlinuz -initrd /tmp/initramfs -append "console=ttyS0 quiet panic=-1" \
        -chardev "socket,id=c0,path=$SOCKET" -object memory-backend-pcow,id=pm,chardev=c0 \
        -device nvdimm,memdev=pm </dev/null >/tmp/guest.log 2>&1 || echo "QEMU ended with $?" >>/tmp/guest.log
    rm /tmp/initramfs
    sed 's/^/guest: /' /tmp/guest.log
    end_backend
    tr -d '\r' </tmp/guest.log | grep -q '^PCOW-GUEST-EXIT 0$' || fail "the guest failed"
    if grep 'QEMU ended with' /tmp/guest.log; then exit 1; fi
}

# Sums of all files of an image that hold layers.
layer_sums() {
    sha256sum "$1"/*.data "$1"/*.map
}

guest_boots_twice() {
    pcow-img create "$DAX/base.pcow" 256M
    guest "$DAX/base.pcow" write one
    guest "$DAX/base.pcow" verify one
    pcow-img check "$DAX/base.pcow"
    pcow-img info "$DAX/base.pcow"
}

# clone NAME WORD [OPTION]...: a clone of the base whose guest changes a part of the base's file.
clone() {
    name=$1
    word=$2
    shift 2
    pcow-img create --base "$DAX/base.pcow" "$@" "$DAX/$name.pcow"
    guest "$DAX/$name.pcow" change "$word"
    pcow-img check "$DAX/$name.pcow"
    pcow-img info "$DAX/$name.pcow"
}

guest_changes_a_clone() {
    pcow-img snapshot "$DAX/base.pcow" before-clones
    layer_sums "$DAX/base.pcow" >/tmp/sums
    clone first two
    sha256sum -c /tmp/sums
}

guests_change_two_clones() {
    clone second three --allocation-unit 64K
    guest "$DAX/first.pcow" verify one two
    guest "$DAX/second.pcow" verify one three
    sha256sum -c /tmp/sums
    guest "$DAX/base.pcow" verify one
}

"$@"
