#!/bin/sh
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# boot.sh SOCKET [KEYBOARD]: boots a guest that runs the script on standard input, with the image that is served at
# SOCKET. It reads what is written to KEYBOARD, a FIFO.
set -e
{ echo 'set -e'; cat; } > script
echo script | cpio -o -H newc --quiet | cat initramfs - > initramfs+script
exec qemu-system-x86_64 -machine q35,nvdimm=on,accel=tcg -cpu max -m 512M,slots=2,maxmem=256G \
    -chardev socket,id=c0,path="$1",reconnect-ms=1000 \
    -object memory-backend-pcow,id=pm,chardev=c0 \
    -device nvdimm,memdev=pm \
    -kernel kernel -initrd initramfs+script -append 'console=ttyS0 quiet panic=-1' \
    -nodefaults -display none -no-reboot -serial stdio 0<> "${2:-/dev/null}"
