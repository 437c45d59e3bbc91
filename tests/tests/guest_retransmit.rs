//! Retransmissions of a real guest behind a real tap device, against the guest's own count.
//! Needs what `cargo xtask test --only guest` makes.

use formtune_agent::sense::tcp::GuestCounts;
use formtune_agent::sense::{ProbeState, Sense, SenseConfig};
use formtune_core::units::Nanos;
use formtune_tests::net;
use formtune_tests::vm_cgroup::VmCgroup;
use std::fs;
use std::io::Read;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const TAP: &str = "ft-guest0";
const BYTES: usize = 24 << 20;
/// Of 65,536: about one packet in 20.
const DROPPED: u16 = 3_300;
const LIMIT: Duration = Duration::from_secs(240);

fn variable(name: &str) -> String {
    std::env::var(name)
        .unwrap_or_else(|_| panic!("no {name}: run this by `cargo xtask test --only guest`"))
}

/// QEMU; killed when dropped.
struct Guest(Child);

impl Guest {
    fn start(group: &VmCgroup, to: &str) -> Self {
        let (kernel, initramfs) =
            (variable("FORMTUNE_GUEST_KERNEL"), variable("FORMTUNE_GUEST_INITRAMFS"));
        let child = Command::new("qemu-system-x86_64")
            .args(["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1"])
            .args(["-m", "256M", "-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-no-reboot", "-serial", "stdio", "-kernel", &kernel, "-initrd", &initramfs])
            .args(["-netdev", &format!("tap,id=net,ifname={TAP},script=no,downscript=no")])
            .args(["-device", "virtio-net-pci,netdev=net", "-append"])
            .arg(format!(
                "console=ttyS0 quiet panic=-1 reboot=t no_timer_check mitigations=off \
                 random.trust_cpu=on address=10.77.0.2/24 to={to} bytes={BYTES}"
            ))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let procs = group.path().join("emulator/cgroup.procs");
        fs::write(procs, child.id().to_string()).unwrap();
        Self(child)
    }

    /// What it said until it ended.
    fn join(&mut self) -> String {
        let mut said = String::new();
        self.0.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        self.0.wait().unwrap();
        said
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Ended already is fine.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_count_is_that_of_the_guest() {
    net::own_namespace().unwrap();
    net::lasting_tap(TAP).unwrap();
    net::address(TAP, [10, 77, 0, 1], [255, 255, 255, 0]).unwrap();
    let vm = VmCgroup::new("ft-guest");
    let patterns = vec![vm.pattern().parse().unwrap()];
    let config = SenseConfig { patterns, max_vms: 64, ..SenseConfig::default() };
    let mut sense = Sense::open(&config, None).unwrap();
    assert_eq!(sense.tcp_health().guest.state, ProbeState::Loaded);
    let begun = Instant::now();
    let mut counts = || -> Option<GuestCounts> {
        sense.sample(Nanos(begun.elapsed().as_nanos() as u64));
        sense.tcp(&vm.id())?.guest
    };
    counts();

    let listener = TcpListener::bind("10.77.0.1:0").unwrap();
    net::drop_some(&listener, DROPPED).unwrap();
    let mut guest = Guest::start(&vm, &listener.local_addr().unwrap().to_string());
    while counts().is_none_or(|counts| counts.taps.is_empty()) {
        assert!(begun.elapsed() < Duration::from_secs(5), "the tap device was not found");
        std::thread::sleep(Duration::from_millis(50));
    }
    let receiver = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let (mut received, mut buffer) = (0, vec![0; 1 << 16]);
        loop {
            match stream.read(&mut buffer).unwrap() {
                0 => return received,
                n => received += n,
            }
        }
    });
    while !receiver.is_finished() {
        assert!(begun.elapsed() < LIMIT, "not done: {:?}", counts());
        assert!(guest.0.try_wait().unwrap().is_none(), "the guest ended: {}", guest.join());
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(receiver.join().unwrap(), BYTES);
    let said = guest.join();
    // As the kernel wrote it, between other lines.
    let snmp: String = said
        .lines()
        .filter_map(|l| l.split_once("SNMP "))
        .fold(String::new(), |text, (_, line)| text + line.trim_end() + "\n");
    let own = net::retrans_segs(&snmp).unwrap_or_else(|| panic!("the guest said: {said}"));
    std::thread::sleep(Duration::from_secs(1));
    let counted = counts().unwrap();
    println!("the guest's own count: {own}; {snmp}{counted:?}");
    assert!(own >= 300, "{own} retransmissions are no test");
    let share = counted.sent.retransmitted as f64 / own as f64;
    assert!((0.9..=1.1).contains(&share), "{counted:?}, the guest says {own}");
    assert!(counted.sent.bytes as usize >= BYTES);
    assert_eq!(counted.sent.untracked + counted.sent.unread, 0);
}
