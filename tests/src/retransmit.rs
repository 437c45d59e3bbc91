//! Retransmissions of both kinds, made by processes in a VM's cgroup: for machines with other
//! kernels, where a test has the whole machine.

use crate::frames::Wire;
use crate::net;
use crate::wait::eventually;
use anyhow::{Context, Result, ensure};
use formtune_agent::sense::Sense;
use formtune_agent::sense::tcp::TcpCounts;
use formtune_core::units::{Nanos, VmId};
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

const BYTES: usize = 12 << 20;
const CHUNK: usize = 1 << 16;
const TAP: &str = "ft-tap0";
/// Retransmissions that make a test.
const LEAST: u64 = 300;
/// Most transfers until there are so many.
const ROUNDS: usize = 6;

/// What a process of the VM is for: `send ADDRESS`, `tap`. Begins with a byte on its standard
/// input.
///
/// # Errors
/// When it cannot do that.
pub fn role(words: &[&str]) -> Result<()> {
    let mut input = std::io::stdin();
    input.read_exact(&mut [0])?;
    match words {
        ["send", address] => {
            let mut stream = TcpStream::connect(address)?;
            for _ in 0..BYTES / CHUNK {
                stream.write_all(&[0x55; CHUNK])?;
            }
        }
        _ => {
            let mut tap = fs::File::from(net::tap(TAP).context("no tap device")?);
            let mut length = [0; 2];
            while input.read_exact(&mut length).is_ok() {
                let mut frame = vec![0; u16::from_be_bytes(length).into()];
                input.read_exact(&mut frame)?;
                tap.write_all(&frame)?;
            }
        }
    }
    Ok(())
}

/// Starts this program in a role, inside a cgroup.
fn start(words: &[&str], group: &Path) -> Result<(Child, ChildStdin)> {
    let mut child = Command::new("/proc/self/exe").args(words).stdin(Stdio::piped()).spawn()?;
    let mut input = child.stdin.take().context("no pipe")?;
    fs::write(group.join("cgroup.procs"), child.id().to_string())?;
    input.write_all(&[0])?;
    Ok((child, input))
}

/// Both kinds, counted for `vm`, which has the cgroup `group`; `sense` is asked for the time.
///
/// # Errors
/// When something is not counted as it was made.
pub fn check(
    sense: &mut Sense,
    vm: &VmId,
    group: &Path,
    now: impl Fn() -> Result<Nanos>,
) -> Result<String> {
    let mut counts = |sense: &mut Sense| -> Result<TcpCounts> {
        sense.sample(now()?);
        sense.tcp(vm).context("no such VM")
    };
    let host = host(sense, group, &mut counts)?;
    Ok(format!("{host}; {}", guest(sense, group, &mut counts)?))
}

type Counts<'a> = &'a mut dyn FnMut(&mut Sense) -> Result<TcpCounts>;

fn host(sense: &mut Sense, group: &Path, counts: Counts<'_>) -> Result<String> {
    let seconds = Duration::from_secs(5);
    let before = eventually(seconds, "count of the host's TCP", || Ok(counts(sense)?.host))
        .with_context(|| format!("{:?}", sense.tcp_health().host))?;
    let kernel = net::retransmitted_segments()?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    net::max_segment(&listener, 1_400)?;
    net::drop_some(&listener, 2_600)?;
    let address = listener.local_addr()?.to_string();
    // How many segments are sent again for the same bytes depends on how many go at once.
    for _ in 0..ROUNDS {
        let (mut child, _input) = start(&["send", &address], group)?;
        let (mut stream, _) = listener.accept()?;
        let (mut received, mut buffer) = (0, vec![0; CHUNK]);
        loop {
            match stream.read(&mut buffer)? {
                0 => break,
                n => received += n,
            }
        }
        child.wait()?;
        ensure!(received == BYTES, "{received} bytes arrived");
        if net::retransmitted_segments()? - kernel >= LEAST {
            break;
        }
    }
    let kernel = net::retransmitted_segments()? - kernel;
    let after = counts(sense)?.host.context("no count any more")?;
    let ours = after.retransmitted - before.retransmitted;
    ensure!(kernel >= LEAST, "{kernel} retransmissions are no test");
    ensure!(ours.abs_diff(kernel) * 10 <= kernel, "host: {ours}, the kernel {kernel}");
    Ok(format!("host: {ours}, the kernel {kernel}"))
}

fn guest(sense: &mut Sense, group: &Path, counts: Counts<'_>) -> Result<String> {
    let (mut child, mut input) = start(&["tap"], group)?;
    let found = eventually(Duration::from_secs(10), "tap device", || {
        Ok(counts(sense)?.guest.filter(|guest| !guest.taps.is_empty()))
    });
    found.with_context(|| format!("{:?}", sense.tcp_health().guest))?;
    let (mut sent, mut again) = (0_u64, 0_u64);
    let mut put = |frame: &[u8]| -> Result<()> {
        input.write_all(&(frame.len() as u16).to_be_bytes())?;
        Ok(input.write_all(frame)?)
    };
    let forms: [fn(&Wire) -> Vec<u8>; 4] =
        [Wire::v4, |w| w.v4_tagged(&[5]), |w| w.v6(&[]), |w| w.v6(&[0, 60])];
    for (flow, form) in (1..).zip(forms) {
        let mut seq = 0_u32.wrapping_sub(20_000);
        for n in 0..400 {
            let frame = form(&Wire::data(flow, seq, 100));
            put(&frame)?;
            sent += 1;
            if n % 4 == 1 {
                put(&frame)?;
                (sent, again) = (sent + 1, again + 1);
            }
            seq = seq.wrapping_add(100);
        }
    }
    let guest = eventually(Duration::from_secs(10), "count of all segments", || {
        Ok(counts(sense)?.guest.filter(|guest| guest.sent.segments >= sent))
    })
    .with_context(|| format!("{:?}", sense.tcp(&"idle".into())))?;
    ensure!(
        (guest.sent.segments, guest.sent.retransmitted) == (sent, again),
        "{sent} segments, {again} of them again, are {guest:?}"
    );
    drop(input);
    child.wait()?;
    eventually(Duration::from_secs(5), "end of the tap device", || {
        Ok((counts(sense)?.guest.is_none_or(|guest| guest.taps.is_empty())).then_some(()))
    })?;
    let method = sense.tcp_health().guest.method.name();
    Ok(format!("guest: {again} of {sent} segments, by {method}"))
}
