//! HTTP on the Unix socket and on loopback TCP: `/metrics`, `/healthz`, `/readyz`, `/v1/*`.
//!
//! Reads only. It runs on a thread of its own, so a slow reader never delays the loop and
//! a loop that hangs can still be reported. Everything a client may send is bounded.

use super::listen::{Bound, Listen, ListenError, bind_all};
use super::routes::{self, HostGuard};
use super::source::Snapshots;
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, watch};

/// Connections at a time, per listener. More wait in the kernel's backlog.
const CONNECTIONS: usize = 32;
/// A client has this long to send the head of its (next) request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection ends after this long, between two requests; a reader that takes nothing
/// off it is cut off [`HEADER_TIMEOUT`] later.
const CONNECTION_AGE: Duration = Duration::from_secs(300);
/// Largest head of a request, bytes, and most header fields; more gets 431.
const HEAD_BYTES: usize = 16 * 1024;
const HEADER_FIELDS: usize = 64;

/// Bound to its addresses, not yet answering: what can go wrong has gone wrong by now.
#[derive(Debug)]
pub struct Server {
    bound: Bound,
}

impl Server {
    /// Takes socket and port. A socket file left by a dead agent is replaced.
    ///
    /// # Errors
    /// Another agent is alive there, the port is taken, or the address is not loopback.
    pub fn bind(to: &Listen) -> Result<Self, ListenError> {
        Ok(Self { bound: bind_all(to)? })
    }

    /// The TCP address, with the port the kernel chose where 0 was asked for.
    pub fn tcp_addr(&self) -> Option<SocketAddr> {
        self.bound.tcp.as_ref().and_then(|tcp| tcp.local_addr().ok())
    }

    /// Answers on a thread of its own until the handle is dropped.
    ///
    /// # Errors
    /// The thread or its event loop could not be made.
    pub fn spawn(self, snapshots: Snapshots) -> io::Result<ServerHandle> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = watch::channel(false);
        let thread = std::thread::Builder::new().name("formtune-http".into()).spawn(move || {
            if let Err(error) = runtime.block_on(serve(self.bound, snapshots, stopped)) {
                tracing::error!("metrics and status are not served any more: {error}");
            }
        })?;
        Ok(ServerHandle { stop, thread: Some(thread) })
    }
}

/// Keeps the server alive; dropping it stops it and removes the socket file.
#[derive(Debug)]
pub struct ServerHandle {
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        let _ = self.stop.send(true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn serve(
    bound: Bound,
    snapshots: Snapshots,
    mut stop: watch::Receiver<bool>,
) -> io::Result<()> {
    let Bound { unix, tcp, file } = bound;
    let unix = UnixListener::from_std(unix)?;
    let router = routes::router(snapshots.clone(), None);
    let on_unix = accept(async || Ok(unix.accept().await?.0), router);
    let on_tcp = async {
        let Some(tcp) = tcp else { return std::future::pending().await };
        let tcp = TcpListener::from_std(tcp)?;
        let guard = HostGuard { port: tcp.local_addr()?.port() };
        accept(async || Ok(tcp.accept().await?.0), routes::router(snapshots, Some(guard))).await
    };
    let ended = tokio::select! {
        ended = on_unix => ended,
        ended = on_tcp => ended,
        _ = stop.changed() => Ok(()),
    };
    drop(file);
    ended
}

async fn accept<Io>(next: impl AsyncFn() -> io::Result<Io>, router: Router) -> io::Result<()>
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let connections = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let permit = connections.clone().acquire_owned().await.map_err(io::Error::other)?;
        match next().await {
            Ok(io) => {
                let router = router.clone();
                tokio::spawn(async move {
                    converse(io, router).await;
                    drop(permit);
                });
            }
            // A connection that was reset before we got to it, or no file descriptor left:
            // both pass, and spinning on the second would make it worse.
            Err(error) => {
                tracing::debug!("failed to accept a connection: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn converse<Io>(io: Io, router: Router)
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(HEAD_BYTES)
        .max_headers(HEADER_FIELDS)
        .serve_connection(TokioIo::new(io), TowerToHyperService::new(router));
    let mut connection = std::pin::pin!(connection);
    if tokio::time::timeout(CONNECTION_AGE, connection.as_mut()).await.is_err() {
        connection.as_mut().graceful_shutdown();
        let _ = tokio::time::timeout(HEADER_TIMEOUT, connection).await;
    }
}
