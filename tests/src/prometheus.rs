//! A real Prometheus that scrapes a real agent.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(60);

/// A running server; dropping it kills it.
#[derive(Debug)]
pub struct Prometheus {
    child: Child,
    port: u16,
}

impl Prometheus {
    /// Starts one that takes native histograms from `target` (address and port) each second,
    /// with all its files below `folder`.
    pub fn start(folder: &Path, target: u16) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let port = free_port()?;
        // From 3.8 on native histograms are a matter of the job, not of a flag.
        let (major, minor) = version()?;
        let native = match (major, minor) >= (3, 8) {
            true => "    scrape_native_histograms: true\n",
            false => "",
        };
        let config = folder.join("prometheus.yml");
        fs::write(
            &config,
            format!(
                "global:\n  scrape_interval: 1s\nscrape_configs:\n  - job_name: formtune\n{native}\
                 \x20   static_configs:\n      - targets: ['127.0.0.1:{target}']\n"
            ),
        )?;
        let log = fs::File::create(folder.join("log"))?;
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", folder.join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .arg("--enable-feature=native-histograms")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("failed to start prometheus (apt-get install prometheus)")?;
        let mut new = Self { child, port };
        let begin = Instant::now();
        while new.get("/-/ready").is_err() {
            if let Some(status) = new.child.try_wait()? {
                bail!(
                    "prometheus ended with {status}: {}",
                    fs::read_to_string(folder.join("log"))?
                );
            }
            ensure!(begin.elapsed() < LIMIT, "prometheus is not ready");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(new)
    }

    /// The result of an instant query.
    pub fn query(&self, query: &str) -> Result<Vec<Value>> {
        let query = formtune_agent::cli::client::segment(query);
        let body = self.get(&format!("/api/v1/query?query={query}"))?;
        let mut answer: Value = serde_json::from_str(&body)?;
        ensure!(answer["status"] == "success", "{answer}");
        match answer["data"]["result"].take() {
            Value::Array(result) => Ok(result),
            other => bail!("no list but {other}"),
        }
    }

    /// The one number that a query gives.
    pub fn number(&self, query: &str) -> Result<f64> {
        match self.query(query)?.as_slice() {
            [one] => Ok(one["value"][1].as_str().context("no number")?.parse()?),
            other => bail!("{query}: not one sample but {other:?}"),
        }
    }

    fn get(&self, path: &str) -> Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        // 1.0: the answer comes in one piece.
        write!(stream, "GET {path} HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
        let status = head.split_whitespace().nth(1).unwrap_or_default();
        ensure!(status == "200", "{path}: {}: {body}", head.lines().next().unwrap_or_default());
        Ok(body.to_owned())
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        // Gone already is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `prometheus, version 2.42.0+ds (…)` → (2, 42)
fn version() -> Result<(u32, u32)> {
    let output = Command::new("prometheus").arg("--version").output();
    let output = output.context("failed to start prometheus (apt-get install prometheus)")?;
    // Older ones say it on standard error.
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let number = text.split("version ").nth(1).context("prometheus has no version")?;
    let mut parts = number.split('.').map(str::parse);
    match (parts.next(), parts.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
        _ => bail!("prometheus has version {number:?}"),
    }
}

/// A port of the loopback address that nobody has now.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
