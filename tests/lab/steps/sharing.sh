# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Others than vCPUs that touch a guest's persistent memory: QEMU's disks, the host's network, KSM.

FILES=$DAX/files.pcow

# Makes an image whose guest wrote the files a, b and c of 8 MiB, unless an earlier step did. Their sums
# are those that it told.
need_files() {
    if [ ! -d "$FILES" ]; then
        pcow-img create --allocation-unit 64K "$FILES" 128M
        guest "$FILES" files
        told sum >/tmp/files.sums
    fi
}

# Disks that are read into memory which the guest's other vCPU loads meanwhile, with each of QEMU's ways
# to read. The guest must see no I/O error, and the disks' bytes in the end.
disks_read_into_dax_memory() {
    need_files
    machine=
    for disk in a b c; do
        dd if=/dev/urandom of="$DAX/disk-$disk" bs=1M count=8 2>/dev/null
        case $disk in
        a) options=aio=threads ;;
        b) options=aio=native,cache=none ;;
        c) options=aio=io_uring,cache=none ;;
        esac
        machine="$machine -drive if=virtio,format=raw,$options,file=$DAX/disk-$disk"
        md5sum <"$DAX/disk-$disk"
    done >/tmp/disks
    pcow-img create --allocation-unit 64K --base "$FILES" "$DAX/reader.pcow"
    guest "$DAX/reader.pcow" disks
    told sum >/tmp/told
    cmp /tmp/told /tmp/disks
    machine=
    guest "$DAX/reader.pcow" sums
    told sum >/tmp/told
    cmp /tmp/told /tmp/disks
    pcow-img check "$DAX/reader.pcow"
    rm -r "$DAX/reader.pcow" "$DAX"/disk-?
}

listen() {
    exec nc -l -p 5000 >/tmp/received
}

# The host's network driver (vhost_net) reads what a guest sends where it stands: in memory that nobody
# has touched before.
network_sends_from_dax_memory() {
    need_files
    # One of an attempt before this would be in the way.
    if [ -e /sys/class/net/tap0 ]; then tunctl -d tap0; fi
    tunctl -t tap0
    ip addr add 10.0.0.1/24 dev tap0
    ip link set tap0 up
    pcow-img create --allocation-unit 64K --base "$FILES" "$DAX/sender.pcow"
    beside=listen
    machine="-netdev tap,id=n0,ifname=tap0,script=no,downscript=no,vhost=on,vhostforce=on"
    machine="$machine -device virtio-net-pci,netdev=n0,romfile="
    guest "$DAX/sender.pcow" send 10.0.0.1:5000
    md5sum </tmp/received >/tmp/told
    head -n 1 /tmp/files.sums >/tmp/expected
    cmp /tmp/told /tmp/expected
    ip link set tap0 down
    tunctl -d tap0
    rm -r "$DAX/sender.pcow"
}

ksm() {
    cat "/sys/kernel/mm/ksm/$1"
}

# Lets the guest go on when everything was scanned for merging several times, and something was merged.
merge() {
    wait_for_guest loaded
    goal=$(($(ksm full_scans) + 3))
    until [ "$(ksm full_scans)" -ge "$goal" ] && [ "$(ksm pages_sharing)" -gt 0 ]; do
        pidof qemu-system-x86_64 >/dev/null || fail "the guest ended" >&2
        usleep 100000
    done
    echo "$(ksm full_scans) scans, $(ksm pages_sharing) pages shared" >&2
    echo go
}

# Merging equal pages would take the write protection from read copies, and stores into them would be
# lost (the region is never mergeable).
no_store_is_lost_to_merging() {
    tr '\0' x </dev/zero | dd of="$DAX/same.raw" bs=64k count=256 iflag=fullblock 2>/dev/null
    pcow-img create --base "$DAX/same.raw" --base-format raw "$DAX/merged.pcow"
    echo 10000 >/sys/kernel/mm/ksm/pages_to_scan
    echo 10 >/sys/kernel/mm/ksm/sleep_millisecs
    echo 1 >/sys/kernel/mm/ksm/run
    beside=merge
    guest "$DAX/merged.pcow" overwrite
    stored=$(told sum)
    echo 2 >/sys/kernel/mm/ksm/run
    beside=
    guest "$DAX/merged.pcow" read
    [ "$(told sum)" = "$stored" ] || fail "stores were lost"
    rm -r "$DAX/merged.pcow" "$DAX/same.raw"
}

# try_qemu [ARGUMENT]...: a machine that does not run, with an image that a backend serves as the chardev c0, and
# its monitor on its standard streams. What it says goes to /tmp/said.
try_qemu() {
    backends=
    start_backend 0 "$DAX/pinned.pcow"
    timeout -s KILL "$GUEST_SECONDS" qemu-system-x86_64 \
        -machine q35,nvdimm=on,accel=kvm -cpu host -m 128M,slots=2,maxmem=2G -S \
        -nodefaults -display none -qmp stdio \
        -chardev "socket,id=c0,path=/tmp/backend0.sock" "$@" >/tmp/said 2>&1 || echo "QEMU ended with $?" >>/tmp/said
    cat /tmp/said
    end_backends
}

# A device that pins all of a guest's memory for its own access would allocate the whole image, and keep
# what a mapping replaced.
pinning_devices_are_refused() {
    pcow-img create "$DAX/pinned.pcow" 64M
    give_device_to_vfio
    memory="memory-backend-pcow,id=pm,chardev=c0"
    device="vfio-pci,host=$pinning,id=pinning"
    # Without the image the device is taken.
    printf '%s\n' '{"execute": "qmp_capabilities"}' '{"execute": "quit"}' |
        try_qemu -device "$device"
    if grep 'QEMU ended with' /tmp/said; then fail "the device is not taken"; fi
    try_qemu -object "$memory" -device "$device" </dev/null
    grep 'vfio .*: Cannot set discarding of RAM broken' /tmp/said
    grep 'QEMU ended with 1' /tmp/said
    printf '%s\n' '{"execute": "qmp_capabilities"}' \
        '{"execute": "object-add", "arguments": {"qom-type": "memory-backend-pcow", "id": "pm", "chardev": "c0"}}' \
        '{"execute": "quit"}' |
        try_qemu -device "$device"
    grep 'memory-backend-pcow .*: there are devices that pin guest memory' /tmp/said
    rm -r "$DAX/pinned.pcow"
}

# Binds the lab host's only device that no driver needs, QEMU's for tests of PCI, and sets $pinning to its address.
give_device_to_vfio() {
    for device in /sys/bus/pci/devices/*; do
        if [ "$(cat "$device/vendor" "$device/device" | tr '\n' ' ')" = '0x1b36 0x0005 ' ]; then
            pinning=$(basename "$device")
        fi
    done
    echo vfio-pci >"/sys/bus/pci/devices/$pinning/driver_override"
    echo "$pinning" >/sys/bus/pci/drivers_probe
    test -e "/sys/bus/pci/drivers/vfio-pci/$pinning"
}
