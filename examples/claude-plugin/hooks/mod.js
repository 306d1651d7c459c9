// agentbus for Claude Code: loaded by the client from our plugin folder, see MOD.md beside this file's source.
//
// Asks the session's own agentbus server, over a unix socket, for what is to be said, and gives it to the session. The
// server answers when something has come, or after 25 s with nothing. One file, no dependencies. It takes no decision
// about a message: what was not given is still in its mailbox. `$` is always spelled $.noun.verb(...): the client reads
// from that what this file may do, and refuses it otherwise.
//
//   POST /next {"module": ID}                          answered with {"post": KEY, "text": TEXT, "note": BOOL} or {}
//   POST /said {"module": ID, "post": KEY, ...}        ... is "submitted": true, "noted": true or "dropped": WHY
const FIRST_PAUSE_MS = 200
const LONGEST_PAUSE_MS = 5_000
// An answer about a post is repeated so often. The server goes by the session's transcript where it hears none.
const TRIES = 5

export function register(on) {
  const id = Math.random().toString(36).slice(2)
  let isStarted = false
  let isBusy = false // whether a turn of the main conversation runs
  let socketPath = "" // where the server answered last

  on("session.start", async ($, event, next) => {
    const result = await next(event)
    if (isStarted) return result
    isStarted = true

    const post = async (path, said) => {
      const answer = await $.http.fetch(`http://agentbus/${path}`, {
        method: "POST",
        socketPath,
        body: JSON.stringify({ module: id, ...said }),
      })
      if (!answer.ok) throw new Error(`agentbus answers ${answer.status}`)
      return JSON.parse(answer.text)
    }

    // The sockets of our own client, in the order of their names. There can be an old one of a process with our pid.
    const sockets = async () => {
      const home = (await $.env.get("AGENTBUS_HOME")) || "~/.agentbus"
      const folder = `${home.replace(/^~(?=\/|$)/, (await $.env.get("HOME")) ?? "")}/mod`
      const { CLAUDE_PID } = await $.process.hookEnv()
      const found = (await $.fs.exists(folder)) ? await $.fs.list(folder) : []
      const names = found.map((one) => one.name).filter((name) => name.startsWith(`${CLAUDE_PID}-`) && name.endsWith(".sock"))
      return names.sort().map((name) => `${folder}/${name}`)
    }

    const give = async (text, note) => {
      if (note && isBusy) {
        const { deny } = await $.session.append({ message: { type: "user", content: [{ type: "text", text }] } })
        return deny === undefined ? { noted: true } : { dropped: String(deny) }
      }
      const { drop } = await $.prompt.submit({ text })
      return drop === undefined ? { submitted: true } : { dropped: String(drop) }
    }

    const carry = async ({ post: key, text, note }) => {
      let said
      try {
        said = await give(text, note)
      } catch (error) {
        said = { dropped: String(error) }
      }
      for (let tries = 0; tries < TRIES; tries += 1) {
        try {
          await post("said", { post: key, ...said })
          return
        } catch {
          await $.clock.sleep(FIRST_PAUSE_MS)
        }
      }
    }

    const ask = async () => {
      let pauseMs = FIRST_PAUSE_MS
      let places = []
      for (;;) {
        try {
          if (!socketPath) {
            if (!places.length) places = await sockets()
            socketPath = places.shift() ?? ""
          }
          if (socketPath) {
            const said = await post("next", {})
            pauseMs = FIRST_PAUSE_MS
            // Not awaited: a prompt can wait for the end of a long turn, and the server has to know that we are here.
            if (said.post !== undefined) void carry(said)
            continue
          }
        } catch {
          // The server has ended, or its answer was lost: it is looked for anew.
          socketPath = ""
          if (places.length) continue
        }
        await $.clock.sleep(pauseMs)
        pauseMs = Math.min(2 * pauseMs, LONGEST_PAUSE_MS)
      }
    }
    void ask()
    return result
  })

  // A subagent's turns have an agentId.
  on("turn.start", ($, event, next) => {
    if (event.agentId === undefined) isBusy = true
    return next(event)
  })
  on("turn.complete", ($, event, next) => {
    if (event.agentId === undefined) isBusy = false
    return next(event)
  })
}
