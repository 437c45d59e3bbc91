//! Asks the running agent over its Unix socket.

use crate::cli::Global;
use crate::config;
use crate::export::routes::ErrorAnswer;
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::Request;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longer than the agent itself waits for its loop, so that its own words are seen.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where the agent is to be found.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct At {
    /// The agent's Unix socket [default: that of the configuration]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
}

impl At {
    /// The socket named, or else that of the configuration.
    ///
    /// # Errors
    /// The configuration cannot be read.
    pub fn socket(&self, global: &Global) -> Result<PathBuf, config::ConfigError> {
        match &self.socket {
            Some(socket) => Ok(socket.clone()),
            None => Ok(config::load(global.config.as_deref())?.socket),
        }
    }
}

/// Why there is no answer; each with what to do.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error(
        "the agent is not running: nobody answers on {} (start it with `formtune run`)",
        .0.display()
    )]
    NotRunning(PathBuf),
    /// The socket is not for us.
    #[error(
        "no permission to use {} (run this as root, or have your user added to the group {})",
        .0.display(),
        crate::export::listen::GROUP
    )]
    Forbidden(PathBuf),
    /// It took too long.
    #[error("the agent did not answer on {} within {} s (see its log)", .0.display(), PATIENCE.as_secs())]
    Silent(PathBuf),
    /// The agent says no.
    #[error("{error} ({hint})")]
    Refused {
        /// HTTP status.
        status: u16,
        /// What the agent says.
        error: String,
        /// What to do.
        hint: String,
    },
    /// Something else answers, or another version of the agent.
    #[error("what answers on {} is not understood: {why} (is it another version of formtune?)", path.display())]
    NotUnderstood {
        /// The socket.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// Anything else.
    #[error("failed to ask the agent on {}: {cause}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// As the system says it.
        cause: io::Error,
    },
}

/// The answer of `path`, which must be percent-encoded already.
///
/// # Errors
/// See [`ClientError`].
pub fn get<T: DeserializeOwned>(socket: &Path, path: &str) -> Result<T, ClientError> {
    let at = || socket.to_path_buf();
    let io = |cause| ClientError::Io { path: at(), cause };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(io)?;
    let answer =
        runtime.block_on(async { tokio::time::timeout(PATIENCE, ask(socket, path)).await });
    let (status, body) = answer.map_err(|_| ClientError::Silent(at()))??;
    let not_understood =
        |why: serde_json::Error| ClientError::NotUnderstood { path: at(), why: why.to_string() };
    if status == 200 {
        return serde_json::from_slice(&body).map_err(not_understood);
    }
    let ErrorAnswer { error, hint } = serde_json::from_slice(&body).map_err(not_understood)?;
    Err(ClientError::Refused { status, error, hint })
}

async fn ask(socket: &Path, path: &str) -> Result<(u16, Bytes), ClientError> {
    let at = || socket.to_path_buf();
    let io = |cause: io::Error| ClientError::Io { path: at(), cause };
    let stream =
        tokio::net::UnixStream::connect(socket).await.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                ClientError::NotRunning(at())
            }
            io::ErrorKind::PermissionDenied => ClientError::Forbidden(at()),
            _ => io(error),
        })?;
    let other = |error: hyper::Error| io(io::Error::other(error));
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(other)?;
    tokio::spawn(connection);
    let request = Request::get(path)
        .header("host", "formtune")
        .body(Empty::<Bytes>::new())
        .map_err(|error| io(io::Error::other(error)))?;
    let answer = sender.send_request(request).await.map_err(other)?;
    let status = answer.status().as_u16();
    let body = answer.into_body().collect().await.map_err(other)?.to_bytes();
    Ok((status, body))
}

/// Percent-encodes everything in `text` that could end a path segment.
pub fn segment(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                encoded.push(char::from(byte));
            }
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}
