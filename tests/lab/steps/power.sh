# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# The lab host loses its power under a guest whose image is in the page cache, on a filesystem of an ordinary disk.
# "write" has the guest tell of its records until the power is gone; the rest is done after the next boot.

DISK=/disk
IMAGE=$DISK/image.pcow
REPORTS=/dev/ttyS1

# Records that are acknowledged before the backend's flush that is to hold them.
HELD_AFTER=40

# The guest's device with its size, its script, what flushes, and what the backend has to say of its image.
choose_device() {
    case $1 in
    virtio-pmem)
        memory_device=virtio-pmem-pci
        size=512M
        guest_script=power-files
        ;;
    nvdimm-*)
        memory_device=nvdimm
        # All of it is read in the end, which takes long in an emulated host.
        size=64M
        guest_script=power-device
        ;;
    esac
    persistence='page cache: a crash of a process loses nothing'
    case $1 in
    nvdimm-interval) backend_program=pcow-backend ;;
    *) backend_program=pcow_backend_that_flushes_when_asked ;;
    esac
}

pcow_backend_that_flushes_when_asked() {
    exec pcow-backend --flush-interval 0 "$@"
}

# mount_disk ext4|xfs
mount_disk() {
    mkdir -p "$DISK"
    write_nothing_back
    mount -t "$1" /dev/vda "$DISK"
    grep " $DISK " /proc/mounts
}

# A file of zeros on the disk, with other bytes over them that only the page cache has.
write_control() {
    dd if=/dev/zero of="$DISK/control" bs=64k count=16 conv=fsync 2>/dev/null
    tr '\0' x </dev/zero | dd of="$DISK/control" bs=64k count=16 iflag=fullblock conv=notrunc 2>/dev/null
}

# Passes on what the guest tells and what is held, line by line in their order, to the log first: what was passed on is in it.
# Somebody else may speak in the middle of a guest's line, which then is no number, and counts for nothing.
pass_on() {
    exec 3>>/tmp/guest.log 4>"$REPORTS"
    return_character=$(printf '\r')
    while read -r line; do
        line=${line%"$return_character"}
        echo "$line" >&3
        case $line in
        *"backend: flushing is slow"*) echo LAB-LATE >&4 ;;
        *"backend: flushing is in time again"*) echo LAB-IN-TIME >&4 ;;
        *"held: pmem0 "[0-9]*) echo "LAB-HELD ${line##*held: }" >&4 ;;
        "first "[0-9]* | "second "[0-9]* | "pmem0 "[0-9]*) echo "LAB-TOLD $line" >&4 ;;
        *) echo "guest: $line" ;;
        esac
    done
}

# The records of which the guest told before a flush of the backend began are promised when that has ended. It is told behind
# all that the guest told before, so that what the guest tells later it did later.
tell_what_is_held() {
    until [ "$(grep -c '^pmem0 [0-9][0-9]*$' /tmp/guest.log)" -ge "$HELD_AFTER" ]; do usleep 100000; done
    held=$(grep '^pmem0 [0-9][0-9]*$' /tmp/guest.log | tail -n 1)
    pcow-img flush -q "$IMAGE"
    echo "held: $held"
}

# While they are, what is old is not promised.
tell_if_flushes_are_late() {
    said=
    while usleep 100000; do
        now=$(grep -o 'flushing is .*' /tmp/backend0.log | tail -n 1)
        [ "$now" = "$said" ] || echo "backend: $now"
        said=$now
    done
}

# run_writers DEVICE: says what is to be passed on, until the guest ends, which it should not.
run_writers() {
    teller=
    case $1 in
    nvdimm-flush) tell_what_is_held & teller=$! ;;
    nvdimm-interval) tell_if_flushes_are_late & teller=$! ;;
    esac
    boot_machine -chardev socket,id=c0,path=/tmp/backend0.sock \
        -object memory-backend-pcow,id=pm0,chardev=c0 \
        -device "$memory_device,memdev=pm0" </dev/null 2>&1 || echo "its emulator: $?"
    # It may have ended by itself.
    [ -z "$teller" ] || kill "$teller" || :
}

# write_until_the_power_is_lost FILESYSTEM DEVICE
write_until_the_power_is_lost() {
    choose_device "$2"
    case $1 in
    ext4) mkfs.ext4 -q -F /dev/vda ;;
    xfs) mkfs.xfs -q -f /dev/vda ;;
    esac
    mount_disk "$1"
    pcow-img create --allocation-unit 64K "$IMAGE" "$size"
    write_control
    write_initramfs "$guest_script" write
    backends=
    start_backend 0 "$IMAGE"
    : >/tmp/guest.log
    run_writers "$2" | pass_on
    cat /tmp/backend0.log
    fail "the guest ended"
}

# What nobody synced has to be gone, or the page cache was not lost.
disk_has_lost_its_page_cache() {
    mount_disk "$1"
    ls -l "$DISK"
    head -c 1048576 /dev/zero | cmp - "$DISK/control"
}

# Storage that the backend had prepared ahead is a leak, and nothing worse. Nothing is repaired before a backend serves it.
image_is_sound() {
    pcow-img check "$IMAGE" || [ $? = 3 ]
}

# guest_finds_its_records DEVICE
guest_finds_its_records() {
    choose_device "$1"
    guest "$IMAGE" "$guest_script" count
    for writer in /mnt/first /mnt/second /dev/pmem0; do
        found=$(told "$writer")
        [ -z "$found" ] || echo "LAB-FOUND ${writer##*/} $found" >"$REPORTS"
    done
    image_is_sound
    pcow-img check --repair "$IMAGE" || [ $? = 3 ]
    pcow-img check "$IMAGE"
}
