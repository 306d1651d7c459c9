// agentbus @VERSION@ for OpenCode: written by `agentbus enable opencode`, removed by `agentbus disable opencode`.
//
// Registers the MCP server of agentbus, gives it the address of a unix socket, and puts what comes there into a session
// as a user message. A message counts as taken when OpenCode builds a request to the model that contains it.
// One file, no dependencies. The socket is ours alone (0600 in a folder 0700) and wants a token, which only the server
// gets. Lines of JSON, from the server:
//   {"token": T}                      first; answered with {"state": {"session": ID or "", "held": WHY or ""}}
//   {"post": KEY, "text": TEXT}       answered with {"taken": KEY} once the model is given it; KEY makes it safe to repeat
import { execFileSync } from "node:child_process"
import { randomBytes } from "node:crypto"
import { chmodSync, lstatSync, mkdirSync, mkdtempSync, readFileSync, readdirSync, rmSync, unlinkSync } from "node:fs"
import net from "node:net"
import { homedir, tmpdir } from "node:os"
import { join, resolve } from "node:path"

const COMMAND = [] // @COMMAND@
const NAME = "agentbus"
// No receipt this long after the session became idle: post again, under the same ids, which is safe in one session. ms
const AGAIN_MS = 3_000
const LONGEST_AGAIN_MS = 60_000
const LOOK_MS = 500
// How many receipts are kept for a server that lost its connection and repeats itself.
const MOST_DONE = 1_000
// sizeof(sun_path) - 1 on macOS, the shorter one.
const MAX_PATH_BYTES = 103
// Commands that hold no session: they get no socket, and leave no trace.
const NO_SESSION = new Set(
  "mcp models agent session stats export import auth providers upgrade uninstall plugin plug debug db completion".split(" "),
)
// Commands in which a session begins with the first prompt, which is not ours to write: there is no screen to show it.
const NO_SCREEN = new Set(["run", "serve", "web", "acp"])

let counter = 0

// Ids as OpenCode makes them: their order is the order of the messages.
function newId(prefix) {
  const at = (BigInt(Date.now()) * 4096n + BigInt(counter++ & 4095)) & 0xffffffffffffn
  return `${prefix}_${at.toString(16).padStart(12, "0")}${randomBytes(7).toString("hex")}`
}

// The words with which OpenCode was started. The screen runs plugins in a thread, which has an argv of its own.
function started() {
  try {
    if (process.platform === "linux") return readFileSync("/proc/self/cmdline", "utf8").split("\0").slice(1, -1)
    return execFileSync("/bin/ps", ["-ww", "-o", "args=", "-p", String(process.pid)], { encoding: "utf8" }).trim().split(/\s+/).slice(1)
  } catch {
    return process.argv.slice(2)
  }
}

function option(words, ...names) {
  for (const [at, word] of words.entries()) {
    if (names.includes(word)) return words[at + 1] ?? ""
    for (const name of names) if (word.startsWith(`${name}=`)) return word.slice(name.length + 1)
  }
  return undefined
}

// The folder of the socket, made for us alone. Throws with the reason when it cannot be trusted.
function folder() {
  const home = resolve((process.env.AGENTBUS_HOME || "~/.agentbus").replace(/^~(?=\/|$)/, homedir()))
  const doors = join(home, "door")
  for (const path of [home, doors]) {
    mkdirSync(path, { recursive: true, mode: 0o700 })
    const facts = lstatSync(path)
    if (!facts.isDirectory() || facts.uid !== process.geteuid() || facts.mode & 0o022) {
      throw new Error(`${path} is not a folder that only you can write to`)
    }
  }
  return Buffer.byteLength(doors) + 32 <= MAX_PATH_BYTES ? doors : mkdtempSync(join(tmpdir(), "agentbus-"))
}

function isDead(pid) {
  try {
    process.kill(pid, 0)
    return false
  } catch (error) {
    return error.code === "ESRCH"
  }
}

// Remove the sockets of processes that have died: nobody answers, and there is no such process. Both are needed: a pid
// means nothing in another container, and the runtime does not say why a connection failed.
function clear(doors) {
  for (const name of readdirSync(doors)) {
    const pid = /^(\d+)-[0-9a-f]{6}\.sock$/.exec(name)?.[1]
    if (!pid || !isDead(Number(pid))) continue
    const asking = net.connect(join(doors, name))
    asking.unref()
    asking.on("connect", () => asking.destroy())
    asking.on("error", () => rmSync(join(doors, name), { force: true }))
  }
}

class Door {
  constructor(client, words, command) {
    this.client = client
    this.words = words
    this.command = command
    this.token = randomBytes(24).toString("hex")
    this.active = "" // the session that the user wrote to last
    this.sessions = new Map() // id -> what is known of it: parent, agent, variant, undo, busy, and since when it is idle
    this.queue = [] // posts that are not in a session yet, in order
    this.waiting = new Map() // by the id of the message: posts that the model was not given yet
    this.done = new Map() // keys of the posts that it was given
    this.held = ""
    this.told = ""
    this.isPosting = false
  }

  listen() {
    const doors = folder()
    clear(doors)
    this.path = join(doors, `${process.pid}-${randomBytes(3).toString("hex")}.sock`)
    this.server = net.createServer((peer) => this.take(peer))
    this.server.on("error", (error) => (this.held = `its socket failed (${error.code})`))
    this.server.listen(this.path, () => chmodSync(this.path, 0o600))
    this.server.unref()
    process.on("exit", () => this.close())
  }

  close() {
    this.server?.close()
    this.peer?.destroy()
    clearInterval(this.timer)
    this.timer = undefined
    try {
      unlinkSync(this.path)
      if (!this.path.includes("/door/")) rmSync(join(this.path, ".."), { recursive: true })
    } catch {
      // it is gone already
    }
  }

  // -- the server ---------------------------------------------------------------------------------------------

  take(peer) {
    peer.unref()
    let rest = ""
    let isKnown = false
    peer.setEncoding("utf8")
    peer.on("error", () => peer.destroy())
    peer.on("close", () => {
      if (this.peer !== peer) return
      // Those are pending for the server, and the next one brings them again.
      this.peer = undefined
      this.queue = []
    })
    peer.on("data", (data) => {
      const lines = (rest + data).split("\n")
      rest = lines.pop()
      for (const line of lines) {
        let said
        try {
          said = JSON.parse(line)
        } catch {
          return peer.destroy()
        }
        if (!isKnown) {
          if (said.token !== this.token) return peer.destroy()
          isKnown = true
          this.peer?.destroy()
          this.peer = peer
          this.begin()
        } else if (said.post !== undefined) {
          this.receive(said.post, said.text)
        }
      }
    })
  }

  tell(said) {
    this.peer?.write(JSON.stringify(said) + "\n")
  }

  // Say which session it is and whether messages are held back, if that has changed.
  async state(isNew = false) {
    const line = JSON.stringify({ state: { session: this.active, held: this.held } })
    if (isNew || line !== this.told) this.tell(JSON.parse(line))
    this.told = line
  }

  async begin() {
    try {
      await this.find()
    } catch {
      // then the first post finds it, or says why not
    }
    this.state(true)
    this.look()
  }

  receive(key, text) {
    if (this.done.has(key)) return this.tell({ taken: key })
    const known = [...this.queue, ...this.waiting.values()]
    if (!known.some((post) => post.key === key)) this.queue.push({ key, text, tries: 0 })
    this.look()
  }

  // -- the session --------------------------------------------------------------------------------------------

  known(id) {
    if (!this.sessions.has(id)) this.sessions.set(id, { isBusy: false, idleAt: 0 })
    return this.sessions.get(id)
  }

  learn(info) {
    const session = this.known(info.id)
    session.parent = info.parentID ?? ""
    session.agent = info.agent ?? session.agent
    session.variant = info.model?.variant ?? session.variant
    session.undo = Boolean(info.revert)
    return session
  }

  async get(id) {
    const found = await this.client.session.get({ path: { id } })
    if (found.data) return this.learn(found.data)
    if (found.response?.status === 404) this.forget(id)
    return undefined
  }

  // The session to post to: the one that the user wrote to last, else the one that this process was started with.
  async find() {
    if (this.active) return this.active
    const asked = option(this.words, "-s", "--session")
    if (asked) this.active = asked
    else if (this.words.includes("-c") || this.words.includes("--continue")) {
      const found = await this.client.session.list()
      const roots = (found.data ?? []).filter((one) => !one.parentID)
      roots.sort((one, other) => other.time.updated - one.time.updated)
      this.active = roots[0]?.id ?? ""
    }
    return this.active
  }

  // On the home screen there is none yet: make one, and show it.
  async make() {
    if (NO_SCREEN.has(this.command)) return ""
    const made = await this.client.session.create({ body: {} })
    if (!made.data) return ""
    this.active = made.data.id
    this.learn(made.data)
    await this.client.tui
      .publish({ body: { type: "tui.session.select", properties: { sessionID: this.active } } })
      .catch(() => {}) // it is there, and not shown: the message counts
    return this.active
  }

  forget(id) {
    this.sessions.delete(id)
    if (this.active === id) {
      this.active = ""
      this.words = [] // the one that was asked for is not there, or no more
    }
    // What was posted there and not given to the model goes to another one, before all else, under new ids.
    const lost = [...this.waiting.values()].filter((post) => post.session === id)
    for (const post of lost) this.waiting.delete(post.message)
    this.queue.unshift(...lost.map((post) => ({ key: post.key, text: post.text, tries: 0 })))
    this.look()
  }

  hold(why) {
    this.held = why
    this.state()
  }

  // -- posting ------------------------------------------------------------------------------------------------

  look() {
    if (this.queue.length || this.waiting.size) {
      this.timer ??= setInterval(() => this.look(), LOOK_MS)
      this.timer.unref?.()
    } else {
      clearInterval(this.timer)
      this.timer = undefined
    }
    if (this.isPosting) return
    this.isPosting = true
    this.work()
      .catch(() => {}) // the next look tries again
      .finally(() => (this.isPosting = false))
  }

  async work() {
    while (this.queue.length) {
      const post = this.queue[0]
      const id = (await this.find()) || (await this.make())
      if (!id) return this.hold("no session has begun in it yet")
      const session = await this.get(id)
      if (!session) return
      if (session.undo) return this.hold("an undo is open in its session: a message would make it final")
      this.hold("")
      Object.assign(post, { session: id, message: newId("msg"), part: newId("prt"), at: Date.now() })
      this.waiting.set(post.message, post)
      if (this.queue[0] === post) this.queue.shift()
      if (!(await this.send(post))) {
        // It may be there or not: under the same ids it is safe to try again.
        post.at = Date.now()
      }
    }
    for (const post of this.waiting.values()) {
      const session = this.known(post.session)
      const pause = Math.min(AGAIN_MS * 2 ** post.tries, LONGEST_AGAIN_MS)
      if (!session.isBusy && Date.now() - Math.max(post.at, session.idleAt) >= pause) {
        post.at = Date.now()
        post.tries += 1
        if (await this.get(post.session)) await this.send(post)
      }
    }
  }

  async send(post) {
    const { agent, variant } = this.known(post.session)
    const sent = await this.client.session.promptAsync({
      path: { id: post.session },
      // Without its agent, a session that only plans would be told to build.
      body: {
        messageID: post.message,
        ...(agent ? { agent } : {}),
        ...(variant && variant !== "default" ? { variant } : {}),
        parts: [{ id: post.part, type: "text", text: post.text }],
      },
    })
    if (sent.response?.status === 404) this.forget(post.session)
    return !sent.error
  }

  // -- what OpenCode tells ------------------------------------------------------------------------------------

  given(messages) {
    for (const { info } of messages) {
      const post = this.waiting.get(info.id)
      if (!post) continue
      this.waiting.delete(info.id)
      this.done.set(post.key, true)
      if (this.done.size > MOST_DONE) this.done.delete(this.done.keys().next().value)
      this.tell({ taken: post.key })
    }
  }

  async written(id, message) {
    if (this.waiting.has(message?.id)) return
    const session = this.known(id)
    session.agent = message?.agent ?? session.agent
    if (session.parent === undefined) await this.get(id)
    if (session.parent) return // a subagent's
    this.active = id
    this.hold("") // a prompt makes an undo final
    this.look()
  }

  event({ type, properties }) {
    const info = properties?.info
    const id = properties?.sessionID
    if (type === "session.created" || type === "session.updated") {
      this.learn(info)
      if (info.id === this.active && this.queue.length === 0) {
        this.hold(info.revert ? "an undo is open in its session: a message would make it final" : "")
      }
    } else if (type === "session.deleted") {
      this.forget(info.id)
    } else if (type === "session.status") {
      const session = this.known(id)
      session.isBusy = properties.status?.type !== "idle"
      if (!session.isBusy) session.idleAt = Date.now()
    } else if (type === "session.idle") {
      Object.assign(this.known(id), { isBusy: false, idleAt: Date.now() })
    }
  }
}

export const Agentbus = async ({ client, directory }) => {
  const words = started()
  // Run from its source, an interpreter's words come first.
  const command = words.find((word) => !word.startsWith("-") && !/\.[cm]?[jt]s$/.test(word)) ?? ""
  // A plugin can be loaded twice for one folder: both share one door.
  const doors = (globalThis[Symbol.for(`${NAME}.opencode`)] ??= new Map())
  let door = doors.get(directory)
  let why = ""
  if (!door && !NO_SESSION.has(command)) {
    door = new Door(client, words, command)
    try {
      door.listen()
      doors.set(directory, door)
    } catch (error) {
      door = undefined
      why = String(error.message ?? error)
    }
  }
  return {
    config: async (config) => {
      config.mcp ??= {}
      // An entry of the user's own, or of the project, stands.
      config.mcp[NAME] ??= {
        type: "local",
        command: COMMAND,
        environment: door
          ? { AGENTBUS_OPENCODE_DOOR: door.path, AGENTBUS_OPENCODE_TOKEN: door.token }
          : { AGENTBUS_OPENCODE_TROUBLE: why },
        // check_messages waits for up to 100 s; without this a call is given up after 60 s.
        timeout: 120_000,
      }
    },
    event: async ({ event }) => door?.event(event),
    "chat.message": async (input, output) => door?.written(input.sessionID, output.message),
    "experimental.chat.messages.transform": async (_input, output) => door?.given(output.messages),
    "tool.execute.before": async (input) => {
      if (input.tool !== `${NAME}_check_messages` || !door) return
      const session = door.sessions.get(input.sessionID)?.parent !== undefined
        ? door.sessions.get(input.sessionID)
        : await door.get(input.sessionID)
      if (session?.parent) {
        throw new Error("the messages of this session are for its main agent, and you are a subagent of it: nothing was taken")
      }
    },
    dispose: async () => {
      door?.close()
      doors.delete(directory)
    },
  }
}
