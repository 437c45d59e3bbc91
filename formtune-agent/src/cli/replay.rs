//! `formtune replay`: the plans that a recorded run leads to.

use super::{GOOD, Global, OneLine};
use crate::export::snapshot::{action_name, sentence};
use crate::record::Replay;
use anyhow::Result;
use formtune_core::plan::{Action, Plan, Reason};
use formtune_core::units::{Nanos, VmId};
use std::collections::BTreeMap;
use std::io::{self, BufWriter, Write};
use std::mem::{Discriminant, discriminant};
use std::path::PathBuf;
use std::process::ExitCode;

/// Arguments of `formtune replay`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Trace written by `formtune run --record`
    file: PathBuf,
}

pub(super) fn run(global: &Global, args: &Args) -> Result<ExitCode> {
    let mut out = BufWriter::new(io::stdout().lock());
    match replay(args, global.json, &mut out).map(|()| out.flush()) {
        Ok(Ok(())) => Ok(GOOD),
        Ok(Err(error)) => ended(error.into()),
        Err(error) => {
            let _ = out.flush();
            ended(error)
        }
    }
}

/// A reader that has gone away (`formtune replay … | head`) is no error.
fn ended(error: anyhow::Error) -> Result<ExitCode> {
    match error.downcast_ref::<io::Error>() {
        Some(io) if io.kind() == io::ErrorKind::BrokenPipe => Ok(GOOD),
        _ => Err(error),
    }
}

fn replay(args: &Args, json: bool, out: &mut impl Write) -> Result<()> {
    let mut told = Told::default();
    for plan in Replay::open(&args.file)? {
        let plan = plan?;
        if json {
            serde_json::to_writer(&mut *out, &plan).map_err(io::Error::from)?;
            out.write_all(b"\n")?;
        } else {
            told.plan(&plan, out)?;
        }
    }
    if !json {
        let Told { plans, setpoints, .. } = told;
        writeln!(out, "{plans} plans, {setpoints} setpoints")?;
    }
    Ok(())
}

/// What was said of each VM last; the same again is left out.
#[derive(Default)]
struct Told {
    began: Option<Nanos>,
    plans: u64,
    setpoints: u64,
    last: BTreeMap<VmId, Discriminant<Reason>>,
}

impl Told {
    fn plan(&mut self, plan: &Plan, out: &mut impl Write) -> io::Result<()> {
        self.plans += 1;
        self.setpoints += plan.setpoints.len() as u64;
        let at = plan.at.since(*self.began.get_or_insert(plan.at)).as_secs_f64();
        for decision in &plan.decisions {
            let why = discriminant(&decision.reason);
            let news = self.last.insert(decision.vm.clone(), why) != Some(why);
            let setpoint = plan.setpoints.iter().find(|setpoint| setpoint.vm == decision.vm);
            if decision.action == Action::Hold && setpoint.is_none() && !news {
                continue;
            }
            let (vm, action) = (OneLine(&decision.vm), action_name(decision.action));
            write!(out, "{at:9.2} s  {vm}  {action}")?;
            if let Some(setpoint) = setpoint {
                write!(out, " {} -> {}", setpoint.from, setpoint.to)?;
            }
            writeln!(out, "  {}", OneLine(sentence(&decision.reason)))?;
        }
        Ok(())
    }
}
