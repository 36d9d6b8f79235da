//! The netns that is meant.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, anyhow};
use balancer_common::decision::member::Member;

use crate::discover::{NetnsHint, OpenNetns, Place, Thread, find_netns};
use crate::sys::netns;

/// The netns that an explanation is asked for.
#[derive(Debug)]
pub enum NetnsChoice {
    /// None is named: the caller's where the service has listeners there, else the only one that
    /// has.
    Unnamed,
    /// The one with that cookie.
    Cookie(u64),
    /// This one.
    Open(OpenNetns),
}

/// What a choice leads to.
pub enum Choice {
    One(Chosen),
    /// Several have listeners, and none is named.
    Several,
}

/// The netns that an explanation is true in.
pub struct Chosen {
    pub netns: OpenNetns,
    how: How,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    /// It is the caller's.
    Own,
    Named,
    /// It is the only one with listeners.
    Only,
}

impl Chosen {
    /// Says which one it is before what is true there; nothing where it is the caller's.
    pub fn prefix(&self, service: &str) -> String {
        let cookie = self.netns.cookie;
        match self.how {
            How::Own => String::new(),
            How::Named => format!("in the network namespace {cookie} "),
            How::Only => format!(
                "in the network namespace {cookie} (the only one with listeners of {service}) "
            ),
        }
    }
}

/// Opens the netns that is meant. `concerned` are the listeners that the answer depends on, `all`
/// those of all services.
pub fn choose(choice: NetnsChoice, concerned: &[&Member], all: &[&Member]) -> Result<Choice> {
    let own = netns::cookie().context("cannot read the cookie of this network namespace")?;
    let (cookie, how) = match choice {
        NetnsChoice::Open(netns) if netns.cookie != own => {
            let how = How::Named;
            return Ok(Choice::One(Chosen { netns, how }));
        }
        NetnsChoice::Open(_) => (own, How::Own),
        NetnsChoice::Cookie(cookie) if cookie == own => (own, How::Own),
        NetnsChoice::Cookie(cookie) => (cookie, How::Named),
        NetnsChoice::Unnamed => match meant(own, &cookies(concerned)) {
            Meant::Own => (own, How::Own),
            Meant::Only(cookie) => (cookie, How::Only),
            Meant::Several => return Ok(Choice::Several),
        },
    };
    let netns = match how {
        How::Own => OpenNetns {
            cookie,
            file: netns::current().context("cannot open this network namespace")?,
        },
        _ => open(cookie, all)?,
    };
    Ok(Choice::One(Chosen { netns, how }))
}

#[derive(Debug, PartialEq, Eq)]
enum Meant {
    Own,
    Only(u64),
    Several,
}

/// Which netns is meant where none is named.
fn meant(own: u64, listening: &BTreeSet<u64>) -> Meant {
    let mut others = listening.iter();
    match (others.next(), others.next()) {
        (None, _) => Meant::Own,
        _ if listening.contains(&own) => Meant::Own,
        (Some(only), None) => Meant::Only(*only),
        _ => Meant::Several,
    }
}

fn cookies(members: &[&Member]) -> BTreeSet<u64> {
    members.iter().map(|member| member.backend.netns).collect()
}

/// Opens a netns by its cookie. `all` are the listeners of all services.
pub fn open(cookie: u64, all: &[&Member]) -> Result<OpenNetns> {
    let listened = all.iter().map(|member| &member.backend);
    let listened = listened.filter(|backend| backend.netns == cookie);
    let thread = |pid, tid| Place::Thread(Thread { pid, tid });
    let hint = NetnsHint {
        cookie,
        places: listened
            .map(|backend| thread(backend.pid, backend.tid))
            .collect(),
    };
    let is_known = !hint.places.is_empty();
    let found = find_netns(hint)
        .with_context(|| format!("cannot look for the network namespace {cookie}"))?;
    found.ok_or_else(|| {
        if is_known {
            return anyhow!(
                "the network namespace {cookie} can't be entered: none of the processes that are \
                 seen here lives in it; ask from where all are seen (in a container: with the \
                 host's process ids), or give its file with --netns"
            );
        }
        let known: Vec<_> = cookies(all).iter().map(u64::to_string).collect();
        anyhow!(
            "there is no network namespace {cookie}; backends listen in {}",
            if known.is_empty() {
                "none".to_owned()
            } else {
                known.join(", ")
            }
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn none_is_guessed_where_several_may_be_meant() {
        for (listening, expected) in [
            (&[][..], Meant::Own),
            (&[7], Meant::Own),
            (&[7, 8], Meant::Own),
            (&[6, 7, 8], Meant::Own),
            (&[8], Meant::Only(8)),
            (&[6, 8], Meant::Several),
            (&[6, 8, 9], Meant::Several),
        ] {
            let listening = listening.iter().copied().collect();
            assert_eq!(meant(7, &listening), expected, "{listening:?}");
        }
    }
}
