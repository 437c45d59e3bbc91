//! What the agent shows, over real sockets and as text: no root needed.

mod block;
mod cli;
mod fixture;
mod forms;
mod http;
mod metrics;
mod words;
