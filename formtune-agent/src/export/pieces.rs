//! A body that is sent while it is made.

use bytes::Bytes;
use hyper::body::{Body, Frame};
use std::convert::Infallible;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::sync::mpsc;

/// Pieces that are made and not sent yet, besides one at either end.
const WAITING: usize = 2;

/// The body: what the other end sends, until it is gone.
#[derive(Debug)]
pub struct Pieces(mpsc::Receiver<Bytes>);

/// The end that makes it.
#[derive(Debug)]
pub struct Maker(mpsc::Sender<Bytes>);

impl Pieces {
    /// Both ends.
    pub fn channel() -> (Maker, Self) {
        let (maker, pieces) = mpsc::channel(WAITING);
        (Maker(maker), Self(pieces))
    }
}

impl Maker {
    /// Waits until the reader has come so far.
    ///
    /// # Errors
    /// The reader is gone.
    pub fn send(&self, piece: Vec<u8>) -> fmt::Result {
        self.0.blocking_send(piece.into()).map_err(|_| fmt::Error)
    }
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(context).map(|piece| piece.map(|bytes| Ok(Frame::data(bytes))))
    }
}
