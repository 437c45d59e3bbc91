#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in $(cat /lib/mods/order); do
    insmod "/lib/mods/$module" 2>/dev/null || echo "insmod $module failed"
done
mount -t ext4 /dev/vda /mnt || echo "no root disk"
mount -t tmpfs -o mode=755 run /mnt/run
cp -a /payload /mnt/run/payload
mount --move /dev /mnt/dev
mount --move /proc /mnt/proc
mount --move /sys /mnt/sys
exec switch_root /mnt /lib/systemd/systemd
