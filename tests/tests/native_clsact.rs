//! Tap devices where there is no TCX, as before 6.6: filters of the qdisc `clsact`, which others
//! use as well, and which outlive an agent that is killed. The newer kernel that this runs on has
//! them too.

use formtune_agent::sense::probes::TapMethod;
use formtune_agent::sense::tcp::{GuestCounts, GuestHealth};
use formtune_agent::sense::{ProbeState, Sense, SenseConfig};
use formtune_core::units::Nanos;
use formtune_tests::agent::Site;
use formtune_tests::frames::Wire;
use formtune_tests::net;
use formtune_tests::taps::{self, TapGuest, tc};
use formtune_tests::vm_cgroup::{VmCgroup, remove_with_all_below};
use formtune_tests::wait::until;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(10);
/// Takes no packet's turn from those behind it, and is nobody's of ours.
const HARMLESS: &str = "bpf bytecode 1,6&0&0&0";

struct Sensing {
    sense: Sense,
    start: Instant,
}

impl Sensing {
    fn open(groups: &[&VmCgroup], max_vms: u32) -> Self {
        let patterns = groups.iter().map(|group| group.pattern().parse().unwrap()).collect();
        let tap_method = Some(TapMethod::Clsact);
        let config = SenseConfig { patterns, max_vms, tap_method, ..SenseConfig::default() };
        let mut new = Self { sense: Sense::open(&config, None).unwrap(), start: Instant::now() };
        assert_eq!(new.health().state, ProbeState::Loaded);
        new
    }

    fn sample(&mut self) {
        self.sense.sample(Nanos(self.start.elapsed().as_nanos() as u64));
    }

    fn health(&mut self) -> GuestHealth {
        self.sample();
        self.sense.tcp_health().guest
    }

    fn counts(&mut self, vm: &VmCgroup) -> GuestCounts {
        self.sample();
        self.sense.tcp(&vm.id()).and_then(|tcp| tcp.guest).unwrap_or_default()
    }

    /// Until so many devices are looked at and so many not.
    #[track_caller]
    fn until_taps(&mut self, expected: (u32, u32)) -> GuestHealth {
        let begun = Instant::now();
        loop {
            let health = self.health();
            if (health.taps, health.taps_not_measured) == expected {
                return health;
            }
            assert!(begun.elapsed() < LIMIT, "not {expected:?}: {health:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// `tc`'s arguments are parted at spaces; `&` stands for those within one.
fn add_filter(device: &str, hook: &str, rest: &str) {
    let words = format!("filter add dev {device} {hook} {rest}");
    let words = words.split(' ').map(|word| word.replace('&', " "));
    assert!(Command::new("tc").args(words).status().unwrap().success(), "{rest}");
}

/// A guest with devices that are there.
fn guest(vm: &VmCgroup, devices: &[&str]) -> TapGuest {
    let guest = TapGuest::start(vm, devices);
    for device in devices {
        until(LIMIT, "tap device", || nix::net::if_::if_nametoindex(*device).ok());
    }
    guest
}

fn send_segments(guest: &mut TapGuest, count: u32) {
    for n in 0..count {
        guest.send(&Wire::data(1, n * 100, 100).v4());
    }
}

#[test]
fn the_qdisc_that_was_made_goes_when_nobody_else_uses_it() {
    net::own_namespace().unwrap();
    let vm = VmCgroup::new("ft-cls-made");
    let _guest = guest(&vm, &["ft-a", "ft-b"]);
    let mut sensing = Sensing::open(&[&vm], 64);
    sensing.until_taps((2, 0));
    for device in ["ft-a", "ft-b"] {
        assert_eq!((taps::our_filters(device), taps::has_clsact(device)), (2, true));
    }
    // Somebody comes to one of them meanwhile, in the direction that is looked at last.
    add_filter("ft-b", "egress", HARMLESS);
    drop(sensing);
    assert_eq!((taps::our_filters("ft-a"), taps::has_clsact("ft-a")), (0, false));
    assert_eq!((taps::our_filters("ft-b"), taps::has_clsact("ft-b")), (0, true));
    assert!(taps::filters("ft-b", "egress").contains("bytecode"));
}

/// A VM that stops being one takes the filters along as well.
#[test]
fn a_device_that_is_let_go_is_as_it_was() {
    net::own_namespace().unwrap();
    let vm = VmCgroup::new("ft-cls-untracked");
    let stays = vm.path().to_owned();
    let mut guest = guest(&vm, &["ft-a"]);
    let mut sensing = Sensing::open(&[&vm], 64);
    sensing.until_taps((1, 0));
    // The process leaves the VM's cgroup, the device stays.
    let outside = stays.parent().unwrap();
    std::fs::write(outside.join("cgroup.procs"), guest.id().to_string()).unwrap();
    drop(vm);
    sensing.until_taps((0, 0));
    assert_eq!((taps::our_filters("ft-a"), taps::has_clsact("ft-a")), (0, false));
    send_segments(&mut guest, 1);
    guest.end();
    // It was in use when the VM's other cgroups went.
    remove_with_all_below(outside);
    assert!(!outside.exists());
}

/// What was there before stays, sees every packet that it saw, and hides none from the agent.
#[test]
fn a_foreign_filter_stays_and_keeps_its_turn() {
    net::own_namespace().unwrap();
    let vm = VmCgroup::new("ft-cls-foreign");
    let mut guest = guest(&vm, &["ft-a"]);
    tc("qdisc add dev ft-a clsact");
    // Drops all, at the first priority that there is.
    add_filter("ft-a", "ingress", "pref 1 bpf da bytecode 1,6&0&0&2");
    add_filter("ft-a", "egress", &format!("pref 7 {HARMLESS}"));
    let before = ["ingress", "egress"].map(|hook| taps::filters("ft-a", hook));
    let dropped = || {
        let shown = tc("-s qdisc show dev ft-a");
        let clsact = &shown[shown.find("clsact").unwrap()..];
        let (_, rest) = clsact.split_once("dropped ").unwrap();
        rest.split(',').next().unwrap().parse::<u64>().unwrap()
    };
    send_segments(&mut guest, 10);
    until(LIMIT, "packet dropped", || (dropped() >= 10).then_some(()));

    let mut sensing = Sensing::open(&[&vm], 64);
    sensing.until_taps((1, 0));
    let others = dropped();
    send_segments(&mut guest, 50);
    until(LIMIT, "count", || (sensing.counts(&vm).sent.segments >= 50).then_some(()));
    assert_eq!(sensing.counts(&vm).sent.segments, 50);
    assert!(dropped() - others >= 50, "{} dropped of 50", dropped() - others);
    drop(sensing);
    assert_eq!(["ingress", "egress"].map(|hook| taps::filters("ft-a", hook)), before);
    assert!(taps::has_clsact("ft-a"));
    guest.end();
}

/// A qdisc `ingress` has one list of filters: what is attached for the other direction would see
/// this one. libvirt makes such for `<bandwidth>`.
#[test]
fn beside_a_qdisc_ingress_nothing_is_attached() {
    net::own_namespace().unwrap();
    let vm = VmCgroup::new("ft-cls-ingress");
    let _guest = guest(&vm, &["ft-a"]);
    tc("qdisc add dev ft-a ingress");
    let mut sensing = Sensing::open(&[&vm], 64);
    let why = sensing.until_taps((0, 1)).why.unwrap();
    assert!(why.contains("qdisc `ingress`"), "{why}");
    assert_eq!(sensing.counts(&vm), GuestCounts::default());
    assert_eq!(taps::our_filters("ft-a"), 0);
    // It is looked at as soon as it can be.
    tc("qdisc del dev ft-a ingress");
    sensing.until_taps((1, 0));
}

/// Other senses in a process of their own, to be killed.
struct Follower(Child);

impl Follower {
    fn start(vm: &VmCgroup) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_follow-taps"));
        Self(command.arg(vm.pattern()).stdin(Stdio::piped()).spawn().unwrap())
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// A VM of two devices, one of which has somebody else's qdisc, and their agent, killed.
fn killed(vm: &VmCgroup) -> TapGuest {
    let guest = guest(vm, &["ft-a", "ft-b"]);
    tc("qdisc add dev ft-b clsact");
    let follower = Follower::start(vm);
    let attached = || (taps::our_filters("ft-a"), taps::our_filters("ft-b")) == (2, 2);
    until(LIMIT, "filters", || attached().then_some(()));
    follower.kill();
    assert!(attached(), "they outlive it");
    guest
}

fn assert_clear() {
    assert_eq!((taps::our_filters("ft-a"), taps::has_clsact("ft-a")), (0, false));
    assert_eq!((taps::our_filters("ft-b"), taps::has_clsact("ft-b")), (0, true));
}

#[test]
fn restore_removes_what_a_killed_agent_left() {
    net::own_namespace().unwrap();
    let vm = VmCgroup::new("ft-cls-restore");
    let site = Site::new("libvirt = \"off\"").unwrap();
    let guest = killed(&vm);
    let restore = |args: &[&str]| {
        let output = site.output(&[&["restore"], args].concat()).unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{error}");
        String::from_utf8(output.stdout).unwrap()
    };
    let said = restore(&[]);
    assert_eq!(
        said,
        "ft-a: formtune's filters and qdisc clsact removed\nft-b: formtune's filters removed\n"
    );
    assert_clear();
    assert_eq!(restore(&[]), "nothing to restore\n");

    // An agent that runs keeps its filters, and loses them when it ends.
    let mut follower = Follower::start(&vm);
    until(LIMIT, "filters", || (taps::our_filters("ft-a") == 2).then_some(()));
    let said = restore(&["--json"]);
    assert!(said.contains("another formtune has its filters"), "{said}");
    assert_eq!(taps::our_filters("ft-a"), 2);
    drop(follower.0.stdin.take());
    assert!(follower.0.wait().unwrap().success());
    assert_clear();
    guest.end();
}

#[test]
fn the_next_start_removes_what_a_killed_agent_left() {
    net::own_namespace().unwrap();
    let (vm, other) = (VmCgroup::new("ft-cls-next"), VmCgroup::new("ft-cls-other"));
    let guest = killed(&vm);
    // Not that VM's: whoever's device it is.
    let sensing = Sensing::open(&[&other], 64);
    until(LIMIT, "end of the filters", || (taps::our_filters("ft-b") == 0).then_some(()));
    drop(sensing);
    assert_clear();

    // The same one's: it makes the qdisc anew and takes it along.
    let follower = Follower::start(&vm);
    until(LIMIT, "filters", || (taps::our_filters("ft-a") == 2).then_some(()));
    follower.kill();
    let mut sensing = Sensing::open(&[&vm], 64);
    sensing.until_taps((2, 0));
    assert_eq!(taps::our_filters("ft-a"), 2);
    drop(sensing);
    assert_clear();
    guest.end();
}

/// Both cannot tell their filters from those of a dead one.
#[test]
fn one_agent_at_a_time_has_filters() {
    net::own_namespace().unwrap();
    let vm = VmCgroup::new("ft-cls-two");
    let guest = guest(&vm, &["ft-a"]);
    let mut first = Sensing::open(&[&vm], 64);
    first.until_taps((1, 0));
    let mut second = Sensing::open(&[&vm], 64);
    let why = second.until_taps((0, 1)).why.unwrap();
    assert!(why.contains("another formtune has its filters"), "{why}");
    assert_eq!(taps::our_filters("ft-a"), 2);
    drop(first);
    second.until_taps((1, 0));
    assert_eq!(taps::our_filters("ft-a"), 2);
    guest.end();
}

/// Devices go while they are looked at, and others come, with as many places as there are.
#[test]
fn a_device_that_goes_frees_its_place() {
    net::own_namespace().unwrap();
    let vm = VmCgroup::new("ft-cls-gone");
    let mut sensing = Sensing::open(&[&vm], 1);
    for round in 0..4 {
        let mut guest = guest(&vm, &["ft-a", "ft-b"]);
        let health = sensing.until_taps((2, 0));
        assert_eq!(health.why, None);
        send_segments(&mut guest, 7);
        let counted = 7 * (round + 1);
        until(LIMIT, "count", || (sensing.counts(&vm).sent.segments >= counted).then_some(()));
        assert_eq!(sensing.counts(&vm).sent.segments, counted);
        // Both ways: under the process that holds it, and with it.
        assert!(Command::new("ip").args(["link", "del", "ft-a"]).status().unwrap().success());
        guest.end();
        sensing.until_taps((0, 0));
    }
}
