//! A node of a cluster that can't be guarded: its daemon is ready and hurts nobody, says what is
//! missing, and tries again.

use std::time::Duration;

use anyhow::{Error, Result};
use tokio::time::sleep;
use tracing::{error, info, warn};

use super::mode::UnfitMode;
use super::signals::{Signal, Signals};
use super::{End, OnExit, Options};
use crate::api::{Request, Response, Server};
use crate::config::{Config, Kubernetes};
use crate::dataplane::{self, Paths};
use crate::doctor;

/// What the log and the verbs call it; the reason follows.
pub const UNFIT: &str = "this node can't be guarded";
/// How long it is until the first new attempt.
const FIRST_PAUSE: Duration = Duration::from_secs(60);
/// How long it is between two of them at the most.
const LONGEST_PAUSE: Duration = Duration::from_secs(600);

/// What has been said, and when to try again.
pub struct Unfit {
    /// The reason that the log has.
    said: Option<String>,
    pause: Duration,
}

impl Default for Unfit {
    fn default() -> Self {
        Self {
            said: None,
            pause: FIRST_PAUSE,
        }
    }
}

impl Unfit {
    /// Stays ready until it is time to try again (`None`), or something ends the daemon.
    ///
    /// # Errors
    /// When it is not known where in which cluster this is, or the admin socket can't be made.
    pub async fn stay(
        &mut self,
        options: &Options,
        config: &Kubernetes,
        error: Error,
        signals: &mut Signals,
    ) -> Result<Option<End>> {
        let error = match doctor::kernel_too_old() {
            Some(sentence) => error.context(sentence),
            None => error,
        };
        let why = format!("{error:#}");
        let mode = UnfitMode::start(config, &why)?;
        let mut admin = Server::bind(&options.admin_socket, &options.state_dir)?;
        if self.said.as_ref() != Some(&why) {
            warn!("{UNFIT}: {why}");
            self.pause = FIRST_PAUSE;
        }
        info!("the next attempt is in {:?}", self.pause);
        info!("ready");
        self.said = Some(why);
        let again = sleep(self.pause);
        self.pause = (2 * self.pause).min(LONGEST_PAUSE);
        tokio::pin!(again);
        let end = loop {
            tokio::select! {
                () = &mut again => return Ok(None),
                (request, reply) = admin.next() => match request {
                    Request::Reload if Config::load(&options.config).is_ok() => {
                        reply.send(&done("the node is looked at again"));
                        return Ok(None);
                    }
                    Request::Cluster => reply.send_long(&Response::Cluster {
                        cluster: Box::new(mode.status()),
                    }),
                    request => reply.send(&answer(options, &request, mode.why())),
                },
                signal = signals.next() => match signal {
                    Signal::Hangup => match Config::load(&options.config) {
                        Ok(_) => return Ok(None),
                        Err(error) => error!("the configuration was not reloaded: {error}"),
                    },
                    Signal::Interrupt => break End::Interrupted,
                    Signal::Terminate => break End::Terminated,
                }
            }
        };
        take_away(options, &mode, end).await?;
        Ok(Some(end))
    }
}

fn done(message: impl Into<String>) -> Response {
    Response::Done {
        message: message.into(),
    }
}

fn answer(options: &Options, request: &Request, why: &str) -> Response {
    match request {
        Request::Ping => done(format!("the daemon lives; {UNFIT}: {why}")),
        Request::Reload => Response::Failed {
            message: match Config::load(&options.config) {
                Ok(_) => "try again".to_owned(),
                Err(error) => error.to_string(),
            },
        },
        _ => Response::Failed {
            message: format!("{UNFIT}: {why}"),
        },
    }
}

/// What an earlier daemon has left in the kernel is for the next one. Without a next one it goes.
async fn take_away(options: &Options, mode: &UnfitMode, end: End) -> Result<()> {
    let unload = match (end, options.on_exit) {
        (_, Some(choice)) => choice == OnExit::Unload,
        (End::Terminated, None) => match mode.none_follows().await {
            Some(why) => {
                info!("no other daemon will follow: {why}");
                true
            }
            None => false,
        },
        (End::Interrupted | End::Unloaded, None) => true,
    };
    let paths = Paths::new(&options.state_dir);
    if unload && paths.state_dir().exists() && dataplane::unload(&paths)? {
        info!("the data plane of an earlier daemon is out of the kernel");
    }
    Ok(())
}
