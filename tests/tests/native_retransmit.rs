//! TCP retransmissions on the running kernel: of the host's own TCP against the kernel's
//! count of its namespace, and of a guest's TCP with frames of known content at a tap device.

use formtune_agent::sense::probes::{Floor, TapMethod};
use formtune_agent::sense::tcp::{GuestCounts, HostCounts};
use formtune_agent::sense::{ProbeState, Sense, SenseConfig};
use formtune_core::units::{Nanos, VmId};
use formtune_tests::agent::{Site, program};
use formtune_tests::frames::Wire;
use formtune_tests::net;
use formtune_tests::payload::{Agent, shown};
use formtune_tests::taps::{self, TapGuest};
use formtune_tests::twin::Twin;
use formtune_tests::vm_cgroup::{Member, VmCgroup};
use formtune_tests::wait::until;
use nix::sys::signal::Signal;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

struct Sensing {
    sense: Sense,
    start: Instant,
}

impl Sensing {
    fn open(groups: &[&VmCgroup]) -> Self {
        let patterns = groups.iter().map(|group| group.pattern().parse().unwrap()).collect();
        let config = SenseConfig { patterns, max_vms: 64, ..SenseConfig::default() };
        let mut new = Self { sense: Sense::open(&config, None).unwrap(), start: Instant::now() };
        let health = new.sense.tcp_health();
        assert_eq!(health.host.state, ProbeState::Loaded);
        assert_eq!(health.guest.state, ProbeState::Loaded);
        new.sample();
        new
    }

    fn sample(&mut self) {
        self.sense.sample(Nanos(self.start.elapsed().as_nanos() as u64));
    }

    fn host(&mut self, vm: &VmId) -> Option<HostCounts> {
        self.sample();
        self.sense.tcp(vm)?.host
    }

    fn guest(&mut self, vm: &VmId) -> Option<GuestCounts> {
        self.sample();
        self.sense.tcp(vm)?.guest
    }

    /// Asks until it is as expected, at most `limit`.
    fn until<T: std::fmt::Debug>(
        &mut self,
        limit: Duration,
        mut ask: impl FnMut(&mut Self) -> T,
        expected: impl Fn(&T) -> bool,
    ) -> T {
        let begun = Instant::now();
        loop {
            let answer = ask(self);
            if expected(&answer) {
                return answer;
            }
            let health = self.sense.tcp_health();
            assert!(begun.elapsed() < limit, "after {limit:?}: {answer:?}, {health:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Sends bytes over a connection that the receiver makes lossy, from a VM's cgroup.
#[test]
fn what_the_host_sends_again_is_counted_for_the_vm_whose_socket_it_is() {
    const BYTES: usize = 40 << 20;
    net::own_namespace().unwrap();
    let (busy, idle) = (VmCgroup::new("ft-tcp-busy"), VmCgroup::new("ft-tcp-idle"));
    let (busy_twin, _idle_twin) = (Twin::of(&busy), Twin::of(&idle));
    let mut sensing = Sensing::open(&[&busy, &idle]);
    sensing.until(Duration::from_secs(2), |s| s.host(&busy.id()), Option::is_some);

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    net::max_segment(&listener, 1_400).unwrap();
    net::drop_some(&listener, 2_000).unwrap();
    let address = listener.local_addr().unwrap();
    let before = net::retransmitted_segments().unwrap();
    let (mut go, mut say) =
        nix::unistd::pipe().map(|(r, w)| (File::from(r), File::from(w))).unwrap();
    let sender = Member::start(&busy, "emulator", None, || {
        // Until it is where it belongs in every hierarchy.
        let _ = go.read(&mut [0]);
        let Ok(mut stream) = TcpStream::connect(address) else { return };
        let chunk = [0x55; 1 << 16];
        for _ in 0..BYTES / chunk.len() {
            if stream.write_all(&chunk).is_err() {
                return;
            }
        }
    });
    busy_twin.take(sender.id());
    say.write_all(&[1]).unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    let (mut received, mut buffer) = (0, vec![0; 1 << 20]);
    loop {
        match stream.read(&mut buffer).unwrap() {
            0 => break,
            n => received += n,
        }
    }
    sender.join();
    assert_eq!(received, BYTES);
    let counted = sensing.host(&busy.id()).unwrap();
    let kernel = net::retransmitted_segments().unwrap() - before;
    let others = sensing.sense.tcp_health().host.no_vm;
    println!("kernel {kernel}, {counted:?}, of no VM {others:?}");
    assert!(kernel >= 300, "{kernel} retransmissions are no test");
    let share = counted.retransmitted as f64 / kernel as f64;
    assert!((0.9..=1.1).contains(&share), "{counted:?}, the kernel {kernel}");
    assert_eq!(sensing.host(&idle.id()), Some(HostCounts::default()));
}

/// A listener's answers that nobody hears are sent again; those are SYN-ACKs of the VM whose
/// listener it is, in the kernel's count like all other segments.
#[test]
fn syn_acks_that_are_sent_again_are_the_listeners() {
    const CALLERS: usize = 20;
    net::own_namespace().unwrap();
    let (busy, idle) = (VmCgroup::new("ft-ack-busy"), VmCgroup::new("ft-ack-idle"));
    let (busy_twin, _idle_twin) = (Twin::of(&busy), Twin::of(&idle));
    let mut sensing = Sensing::open(&[&busy, &idle]);
    sensing.until(Duration::from_secs(2), |s| s.host(&busy.id()), Option::is_some);
    let (mut go, mut say) =
        nix::unistd::pipe().map(|(r, w)| (File::from(r), File::from(w))).unwrap();
    // Nobody else is in this namespace.
    let address = SocketAddr::from(([127, 0, 0, 1], 4_000));
    let server = Member::start(&busy, "emulator", None, || {
        // Until it is where it belongs in every hierarchy.
        let _ = go.read(&mut [0]);
        let Ok(_listener) = TcpListener::bind(address) else { return };
        loop {
            std::thread::sleep(Duration::from_secs(1));
        }
    });
    busy_twin.take(server.id());
    say.write_all(&[1]).unwrap();
    until(Duration::from_secs(10), "listener", || TcpStream::connect(address).ok());
    let before = net::retransmitted_segments().unwrap();
    let callers: Vec<OwnedFd> = (0..CALLERS).map(|_| net::deaf_caller(address).unwrap()).collect();
    let many = |counts: &Option<HostCounts>| counts.unwrap().syn_acks >= CALLERS as u64;
    sensing.until(Duration::from_secs(20), |s| s.host(&busy.id()), many);
    // They call again, too, which is not the listener's. Asked while nothing is sent again.
    let sent_again = || {
        let calls = callers.iter().map(|caller| net::sent_again(caller).unwrap()).sum::<u64>();
        (net::retransmitted_segments().unwrap() - before, calls)
    };
    let ((kernel, calls), counted) = until(Duration::from_secs(20), "quiet moment", || {
        let all = sent_again();
        std::thread::sleep(Duration::from_millis(50));
        let counted = sensing.host(&busy.id()).unwrap();
        (sent_again() == all).then_some((all, counted))
    });
    println!("kernel {kernel}, {calls} of them calls; {counted:?}");
    let answers = kernel - calls;
    assert_eq!(counted, HostCounts { retransmitted: answers, syn_acks: answers });
    assert_eq!(sensing.host(&idle.id()), Some(HostCounts::default()));
}

#[test]
fn what_a_guest_sends_again_is_recognised_on_its_tap() {
    net::own_namespace().unwrap();
    let (busy, idle) = (VmCgroup::new("ft-tap-busy"), VmCgroup::new("ft-tap-idle"));
    let mut sensing = Sensing::open(&[&busy, &idle]);
    let mut guest = TapGuest::start(&busy, &["ft-tap0"]);
    let limit = Duration::from_secs(1);
    let has_tap =
        |counts: &Option<GuestCounts>| counts.as_ref().is_some_and(|c| !c.taps.is_empty());
    let counts = sensing.until(limit, |s| s.guest(&busy.id()), has_tap).unwrap();
    assert_eq!(counts.taps, ["ft-tap0"]);

    let len = 100;
    let forms: [fn(&Wire) -> Vec<u8>; 4] =
        [Wire::v4, |w| w.v4_tagged(&[5]), |w| w.v6(&[]), |w| w.v6(&[0, 60])];
    for (flow, form) in (1..).zip(forms) {
        // Across the end of the sequence numbers.
        let mut seq = 0_u32.wrapping_sub(450);
        for n in 0..10 {
            guest.send(&form(&Wire::data(flow, seq, len)));
            if n % 2 == 1 {
                guest.send(&form(&Wire::data(flow, seq, len)));
            }
            seq = seq.wrapping_add(len.into());
        }
    }
    guest.send(&[0xff; 20]);
    let mut fragment = Wire::data(1, 0, len).v4();
    fragment[14 + 6] = 0x20;
    guest.send(&fragment);
    let all = |counts: &Option<GuestCounts>| counts.as_ref().unwrap().sent.segments >= 60;
    let counts = sensing.until(Duration::from_secs(3), |s| s.guest(&busy.id()), all).unwrap();
    println!("{counts:?}");
    assert_eq!(counts.sent.segments, 60);
    assert_eq!(counts.sent.bytes, 6_000);
    assert_eq!((counts.sent.retransmitted, counts.sent.retransmitted_bytes), (20, 2_000));
    assert_eq!((counts.sent.reordered, counts.sent.untracked), (0, 0));
    assert_eq!(counts.sent.unread, 1);
    assert_eq!(sensing.guest(&idle.id()), None, "it has no tap");

    // The device goes while it is looked at.
    guest.end();
    let none = |counts: &Option<GuestCounts>| counts.as_ref().unwrap().taps.is_empty();
    let kept = sensing.until(limit, |s| s.guest(&busy.id()), none).unwrap();
    assert_eq!(kept.sent, counts.sent, "what was counted stays");
    let health = sensing.sense.tcp_health().guest;
    assert_eq!(health.taps, 0);
    shown("retransmit", Some(&format!("yes, {}", health.method.name())));
}

/// One in four flows is followed, seen wholly and counted four times.
#[test]
fn counts_of_a_sample_of_flows_are_without_bias() {
    // So few that all have room.
    const FLOWS: u16 = 800;
    const SHIFT: u8 = 2;
    net::own_namespace().unwrap();
    let vm = VmCgroup::new("ft-tap-sampled");
    let mut sensing = Sensing::open(&[&vm]);
    let mut guest = TapGuest::start(&vm, &["ft-tap2"]);
    let limit = Duration::from_secs(10);
    let has_tap =
        |counts: &Option<GuestCounts>| counts.as_ref().is_some_and(|c| !c.taps.is_empty());
    sensing.until(limit, |s| s.guest(&vm.id()), has_tap);
    // Each sends a segment, and that again twice; returns what was counted of it.
    let mut before = sensing.guest(&vm.id()).unwrap().sent;
    let mut round = |sensing: &mut Sensing, seq: u32| {
        for flow in 0..FLOWS {
            let frame = Wire::data(flow, seq, 100).v4();
            (0..3).for_each(|_| guest.send(&frame));
        }
        let all = u64::from(FLOWS) * 3;
        let sent = |s: &mut Sensing| s.guest(&vm.id()).unwrap().sent.since(&before);
        let counted = sensing.until(limit, sent, |counted| counted.segments >= all);
        before.add(&counted);
        assert_eq!((counted.segments, counted.bytes), (all, all * 100));
        assert_eq!(counted.untracked, 0);
        counted
    };
    let all = u64::from(FLOWS) * 2;
    assert_eq!(round(&mut sensing, 0).retransmitted, all);

    sensing.sense.sample_one_in(SHIFT);
    let shift = |s: &mut Sensing| s.sense.tcp_health().guest.sampling_shift;
    sensing.until(limit, shift, |shift| *shift == u32::from(SHIFT));
    let counted = round(&mut sensing, 1_000);
    println!("{counted:?} of {all}");
    assert_eq!(counted.retransmitted % (2 << SHIFT), 0, "of each flow all or nothing");
    assert_eq!(counted.retransmitted_bytes, counted.retransmitted * 100);
    // Six standard deviations of a sum over a random one in four flows.
    let deviation = (f64::from(FLOWS) * 4.0 * f64::from((1 << SHIFT) - 1)).sqrt();
    let error = (counted.retransmitted as f64 - all as f64).abs();
    assert!(error <= 6.0 * deviation, "{error} ± {deviation}");
    assert_ne!(counted.retransmitted, all, "all were followed");
    // Of each of the other flows all three segments were left out.
    let left_out = u64::from(FLOWS) - counted.retransmitted / (2 << SHIFT);
    assert_eq!(sensing.sense.tcp_health().guest.unsampled, 3 * left_out);

    // All begin anew, also those of which the last thing known lies gigabytes ahead.
    sensing.sense.sample_one_in(0);
    sensing.until(limit, shift, |shift| *shift == 0);
    // Until what was known of them may make room.
    std::thread::sleep(Duration::from_millis(2_600));
    assert_eq!(round(&mut sensing, 0_u32.wrapping_sub(1 << 29)).retransmitted, all);
    guest.end();
}

/// A process that leaves one VM for another takes its device along; nothing counts for both.
#[test]
fn a_device_is_one_vm_s_at_a_time() {
    net::own_namespace().unwrap();
    let (first, second) = (VmCgroup::new("ft-tap-from"), VmCgroup::new("ft-tap-to"));
    let mut sensing = Sensing::open(&[&first, &second]);
    let mut guest = TapGuest::start(&first, &["ft-tap3"]);
    let limit = Duration::from_secs(10);
    let segments =
        |counts: Option<GuestCounts>| counts.map_or((0, 0), |c| (c.taps.len(), c.sent.segments));
    let of = |s: &mut Sensing| [&first, &second].map(|vm| segments(s.guest(&vm.id())));
    sensing.until(limit, of, |counts| *counts == [(1, 0), (0, 0)]);
    (0..20).for_each(|n| guest.send(&Wire::data(1, n * 100, 100).v4()));
    sensing.until(limit, of, |counts| *counts == [(1, 20), (0, 0)]);

    let procs = second.path().join("emulator/cgroup.procs");
    std::fs::write(procs, guest.id().to_string()).unwrap();
    // New devices have all VMs looked at.
    let _other = net::tap("ft-tap4").unwrap();
    sensing.until(limit, of, |counts| *counts == [(0, 20), (1, 0)]);
    (20..50).for_each(|n| guest.send(&Wire::data(1, n * 100, 100).v4()));
    sensing.until(limit, of, |counts| counts[1].1 >= 30);
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(of(&mut sensing), [(0, 20), (1, 30)]);
    guest.end();
}

/// More devices and VMs than places: those that have none are counted nowhere, and one line of the
/// log says so.
#[test]
fn what_has_no_place_is_said_once_and_counted_for_nobody() {
    net::own_namespace().unwrap();
    let (some, others) = (VmCgroup::new("ft-tap-some"), VmCgroup::new("ft-tap-none"));
    let mut some_guest = TapGuest::start(&some, &["ft-s0", "ft-s1", "ft-s2", "ft-s3"]);
    let limit = Duration::from_secs(20);
    let site = Site::new(&format!(
        "max_vms = 1\nlibvirt = \"off\"\nlisten = \"off\"\ncgroups = [\"{}\", \"{}\"]",
        some.pattern(),
        others.pattern()
    ))
    .unwrap();
    let agent = site.run(&[]).unwrap();
    let metric = |name: &str| -> f64 {
        let text = agent.get("/metrics").unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)).expect(name);
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    let taps =
        || ["formtune_tcp_taps ", "formtune_tcp_unmeasured_taps "].map(|name| metric(name) as u32);
    until(limit, "two of four taps", || (taps() == [2, 2]).then_some(()));
    // There are places for two devices.
    let mut others_guest = TapGuest::start(&others, &["ft-o0"]);
    until(limit, "two of five taps", || (taps() == [2, 3]).then_some(()));
    let frames = |guest: &mut TapGuest| {
        (0..10).for_each(|n| guest.send(&Wire::data(1, n * 100, 100).v4()));
    };
    frames(&mut some_guest);
    frames(&mut others_guest);
    let counted = |vm: &VmCgroup| {
        let text = agent.get("/metrics").unwrap();
        let of = format!("formtune_vm_tcp_segments_total{{vm=\"{}\"", vm.id().0);
        let values = text.lines().filter(|line| line.starts_with(&of));
        values.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum::<f64>()
    };
    until(limit, "count", || (counted(&some) >= 10.0).then_some(()));
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!((counted(&some), counted(&others)), (10.0, 0.0));

    // Those that have places go: the other VM's turn.
    some_guest.end();
    until(limit, "one tap", || (taps() == [1, 0]).then_some(()));
    frames(&mut others_guest);
    until(limit, "count", || (counted(&others) >= 10.0).then_some(()));
    assert_eq!((counted(&some), counted(&others)), (10.0, 10.0));
    assert!(agent.end(Signal::SIGTERM).unwrap().success());
    let log = site.log();
    let said = |what: &str| log.lines().filter(|line| line.contains(what)).count();
    assert_eq!(said("there is room for 2 (`max_vms`)"), 1, "{log}");
    assert_eq!(said("VMs wait for CPUs unmeasured"), 1, "{log}");
    others_guest.end();
}

/// Programs of the agent on a device, and whether somebody else's is still on it.
fn on_device(device: &str, method: TapMethod) -> (usize, bool) {
    match method {
        TapMethod::Tcx => {
            let programs = |hook| net::tcx_programs(device, hook).unwrap();
            let (ingress, egress) = (programs(net::INGRESS), programs(net::EGRESS));
            let other = ingress.iter().filter(|name| *name == "floor_tap").count();
            (ingress.len() - other + egress.len(), other == 1)
        }
        TapMethod::Clsact => {
            (taps::our_filters(device), taps::filters(device, "ingress").contains("floor_tap"))
        }
    }
}

/// However the agent ends, and what was on the device before stays.
#[test]
fn programs_leave_the_device_with_the_agent() {
    const TAP: &str = "ft-tap1";
    net::own_namespace().unwrap();
    let vm = VmCgroup::new("ft-tap-agent");
    let guest = TapGuest::start(&vm, &[TAP]);
    let limit = Duration::from_secs(10);
    let until = |what: &str, is: &dyn Fn() -> bool| {
        let begun = Instant::now();
        while !is() {
            assert!(begun.elapsed() < limit, "{what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    until("no tap device", &|| nix::net::if_::if_nametoindex(TAP).is_ok());
    let _other = Floor::tap(TAP).unwrap();
    let method = TapMethod::of_kernel();
    assert_eq!(on_device(TAP, method), (0, true));

    let folder = tempfile::tempdir().unwrap();
    let settings = format!("libvirt = \"off\"\ncgroups = [\"{}\"]\n", vm.pattern());
    let start = || Agent::start(&program(), folder.path(), &settings).unwrap();
    let mut agent = start();
    until("it attaches", &|| on_device(TAP, method) == (2, true));
    agent.signal(Signal::SIGKILL).unwrap();
    agent.wait().unwrap();
    if method == TapMethod::Tcx {
        until("links end with their process", &|| on_device(TAP, method) == (0, true));
    }

    let mut agent = start();
    until("it attaches again, and only once", &|| on_device(TAP, method) == (2, true));
    agent.signal(Signal::SIGTERM).unwrap();
    assert!(agent.wait().unwrap().success());
    until("they leave when it stops", &|| on_device(TAP, method) == (0, true));
    guest.end();
}
